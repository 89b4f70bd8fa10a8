"""Tells transformers about the quantization method `compress`, without importing transformers.

transformers has no entry points for quantizers: a method is known once `register_quantizer` was called. Calling it at
`import compress` would import transformers and torch, seconds that `compress --help` should not cost. So this module
puts a finder in front of the import system that waits for the one module that holds the registry,
`transformers.quantizers.auto`, lets the regular finders load it, and then imports our integration, which registers
itself. If that module is loaded already, the integration is imported at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"
INTEGRATION = "compress.integrations.transformers"


class RegisterAfter(Loader):
    """Loads a module with its own loader, then imports the integration."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        import_module(INTEGRATION)


class RegistryFinder(MetaPathFinder):
    """Finds `transformers.quantizers.auto` as the other finders do, and wraps its loader. Finds nothing else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        for finder in sys.meta_path:
            if isinstance(finder, RegistryFinder):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = RegisterAfter(spec.loader)
                return spec
        return None


def install() -> None:
    """Register now if transformers has its registry, otherwise when it gets one. Calling it again changes nothing."""
    if REGISTRY in sys.modules:
        import_module(INTEGRATION)
    elif not any(isinstance(finder, RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, RegistryFinder())
