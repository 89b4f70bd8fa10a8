"""Tells transformers and PEFT about packed modules, without importing either.

transformers has no entry points for quantizers: a method is known once `register_quantizer` was called. Calling it at
`import compress` would import transformers and torch, seconds that `compress --help` should not cost. So this module
puts a finder in front of the import system that waits for the one module that holds the registry,
`transformers.quantizers.auto`, lets the regular finders load it, and then imports our integration, which registers
itself. If that module is loaded already, the integration is imported at once. With PEFT, whose adapters are made by
`peft.tuners.lora.model`, it is the same.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import MappingProxyType, ModuleType
from typing import Final

INTEGRATIONS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "transformers.quantizers.auto": "compress.integrations.transformers",
        "peft.tuners.lora.model": "compress.integrations.peft",
    }
)
"""What is imported after each module."""


class RegisterAfter(Loader):
    """Loads a module with its own loader, then imports the integration."""

    def __init__(self, loader: Loader, integration: str) -> None:
        self._loader, self._integration = loader, integration

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        import_module(self._integration)


class IntegrationFinder(MetaPathFinder):
    """Finds the modules of `INTEGRATIONS` as the other finders do, and wraps their loaders. Finds nothing else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in INTEGRATIONS:
            return None
        for finder in sys.meta_path:
            if isinstance(finder, IntegrationFinder):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = RegisterAfter(spec.loader, INTEGRATIONS[fullname])
                return spec
        return None


def install() -> None:
    """Register now with what is loaded, with the rest when it gets loaded. Calling it again changes nothing."""
    for module, integration in INTEGRATIONS.items():
        if module in sys.modules:
            import_module(integration)
    if not any(isinstance(finder, IntegrationFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, IntegrationFinder())
