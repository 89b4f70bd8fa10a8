"""Make a large model small: distil a student from a teacher, quantize it to few bits, write a file that runs.

The public verbs are resolved when they are first used, so `import compress` loads neither torch nor transformers.
What it does at once is to ask to be told when transformers loads its quantizers (see `hook`): from then on
`from_pretrained` reads the artifacts of this package, whichever of the two was imported first.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from compress import hook

if TYPE_CHECKING:
    from compress.exporters import export
    from compress.modeling.loading import load_model as load
    from compress.pipeline import run
    from compress.quantization.api import quantize, transform
    from compress.recipe import Recipe
    from compress.reporting.evaluate import evaluate
    from compress.verbs import distill

__version__ = "0.1.0"
__all__ = ["Recipe", "distill", "evaluate", "export", "load", "quantize", "run", "transform"]

_VERBS = {
    "Recipe": ("compress.recipe", "Recipe"),
    "distill": ("compress.verbs", "distill"),
    "evaluate": ("compress.reporting.evaluate", "evaluate"),
    "export": ("compress.exporters", "export"),
    "load": ("compress.modeling.loading", "load_model"),
    "quantize": ("compress.quantization.api", "quantize"),
    "run": ("compress.pipeline", "run"),
    "transform": ("compress.quantization.api", "transform"),
}


def __getattr__(name: str) -> Any:
    if name not in _VERBS:
        raise AttributeError(f"module 'compress' has no attribute '{name}'")
    module, attribute = _VERBS[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


hook.install()
