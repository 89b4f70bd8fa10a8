# Every goal makes the virtual environment it needs. Settings: make test VENV=/path PYTHON=python3.12
# Outside a machine with a GPU:  make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
DATA ?=
SECONDS ?= 600
BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -q -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
REAL := $(if $(DATA),--real-data $(DATA))

.PHONY: demo test test-5.17 tiny style bench fuzz models clean

demo: $(VENV)/.installed
	$(BIN)/compress run recipes/demo.yaml --restart

# two processes; threads that spin while they wait would take the processor from the other one
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 GOMP_SPINCOUNT=0 $(BIN)/python -m pytest -n 2 --dist loadfile $(REAL)

# artifacts read with the oldest transformers that is supported; everything else as pinned
OLDEST := $(VENV)/build/transformers-5.17.0
test-5.17: $(VENV)/.installed $(OLDEST)/.installed
	$(BIN)/python -m pytest --transformers-overlay $(OLDEST) tests/integrations/test_other_transformers.py

$(OLDEST)/.installed: constraints.txt
	rm -rf $(OLDEST) && mkdir -p $(OLDEST)
	grep -vE '^(transformers|huggingface_hub)==' constraints.txt > $(OLDEST)/constraints.txt
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -q --target $(OLDEST) -c $(OLDEST)/constraints.txt transformers==5.17.0
	touch $@

tiny: $(VENV)/.installed
	$(BIN)/python -m pytest -m tiny tests/test_tiny.py

style: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/crash.py --quick
	$(BIN)/python benchmarks/distill_or_labels.py --quick

fuzz: $(VENV)/.installed
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS)

models: $(VENV)/.installed
	$(BIN)/python models/build.py

$(VENV)/.installed: pyproject.toml constraints.txt CMakeLists.txt $(wildcard cuda/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build demo-out demo-out.work compress/_native*.so
