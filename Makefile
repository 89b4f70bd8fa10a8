# Every goal makes the virtual environment it needs. Settings: make test VENV=/path PYTHON=python3.12
# Outside a machine with a GPU:  make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
DATA ?=
BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -q -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
REAL := $(if $(DATA),--real-data $(DATA))

.PHONY: demo test tiny style bench models clean

demo: $(VENV)/.installed
	$(BIN)/compress run recipes/demo.yaml --restart

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(REAL)

tiny: $(VENV)/.installed
	$(BIN)/python -m pytest -m tiny tests/test_tiny.py

style: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/crash.py --quick
	$(BIN)/python benchmarks/distill_or_labels.py --quick

models: $(VENV)/.installed
	$(BIN)/python models/build.py

$(VENV)/.installed: pyproject.toml constraints.txt CMakeLists.txt $(wildcard cuda/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build demo-out demo-out.work compress/_native*.so
