"""The `quantization_config` in an artifact's config.json: everything that decoding needs to know, and nothing else.

```
"quantization_config": {
  "quant_method": "compress", "format_version": 1, "producer": "compress 0.1.0",
  "default": {"codec": "pyramid", ..., "width": 51},             a codec's spec
  "modules": {"model.layers.0.self_attn.q_proj": {"width": 52}},  what differs from it, by module
  "tables": {"model.embed_tokens": {"codec": "integer", ...}},    embedding and head, where they are quantized
  "ignore": ["lm_head"],                                          matrices that are stored as they were
  "bits_per_weight": 3.2494                                       without tables
}
```

A tied table is listed once, as what it is stored as; the modules that share it are known from the model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import compress
from compress.codecs.base import CodecSpec
from compress.codecs.registry import codec_of
from compress.errors import ArtifactError, quoted
from compress.modeling.names import align_name

if TYPE_CHECKING:
    from compress.modeling.tables import Table

QUANT_METHOD = "compress"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class QuantizationConfig:
    """Which spec each quantized module has. `specs` lists exceptions from `default`; `ignore` what is not quantized;
    `tables` the embedding and the head if they are."""

    default: CodecSpec
    specs: Mapping[str, CodecSpec]
    ignore: tuple[str, ...]
    bits_per_weight: float
    producer: str = f"compress {compress.__version__}"
    tables: Mapping[str, CodecSpec] = field(default_factory=dict)

    @classmethod
    def from_specs(
        cls,
        specs: Mapping[str, CodecSpec],
        ignore: Iterable[str],
        bits_per_weight: float,
        tables: Iterable[tuple[Table, CodecSpec]] = (),
    ) -> Self:
        """From the spec of every quantized module. The most frequent one (the first of equals) is the default."""
        common = Counter(specs.values()).most_common(1)[0][0]
        differing = {name: spec for name, spec in specs.items() if spec != common}
        stored = {table.view.name: spec for table, spec in tables}
        return cls(common, differing, tuple(sorted(ignore)), bits_per_weight, tables=stored)

    def by_module(self, modules: Collection[str], prefix: str) -> dict[str, CodecSpec]:
        """The spec of each of `modules`, the linear maps of a model's blocks, that is quantized, in their order.

        The names here are those of the model that was quantized; one that is loaded as a bare backbone, or was saved
        as such, lacks the `prefix` (see `align_name`). Raises `ArtifactError` for a name that the model does not have.
        """
        own = {name: align_name(name, modules, prefix) for name in (*self.specs, *self.ignore)}
        for name in self.specs:
            if own[name] is None:
                raise ArtifactError(
                    f"quantization_config names {quoted(name)}, which the model does not have.",
                    remedy="Load the artifact with the class that config.json names in 'architectures'.",
                )
        ignored, specs = {own[name] for name in self.ignore}, {own[name]: spec for name, spec in self.specs.items()}
        return {name: specs.get(name, self.default) for name in modules if name not in ignored}

    def to_dict(self) -> dict[str, Any]:
        """As in the module's docstring: plain data."""
        default = self.default.to_dict()
        modules = {name: _difference(spec.to_dict(), default) for name, spec in self.specs.items()}
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "producer": self.producer,
            "default": default,
            "modules": modules,
            **({"tables": {name: spec.to_dict() for name, spec in self.tables.items()}} if self.tables else {}),
            "ignore": list(self.ignore),
            "bits_per_weight": self.bits_per_weight,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises `ArtifactError` for another method, version, or shape of the table."""
        if data.get("quant_method") != QUANT_METHOD:
            raise ArtifactError(
                f"This model was not quantized by compress (its quant_method is {quoted(data.get('quant_method'))}).",
                remedy="Name an artifact of `compress quantize`.",
            )
        if type(data.get("format_version")) is not int or data["format_version"] != FORMAT_VERSION:
            raise ArtifactError(
                f"The artifact has format version {quoted(data.get('format_version'))}; this version reads "
                f"{FORMAT_VERSION}.",
                remedy="Install the version of model-compress that wrote it, named in quantization_config.producer.",
            )
        match data:
            case {
                "default": dict(default),
                "modules": dict(modules),
                "ignore": [*ignore],
                "bits_per_weight": int() | float() as rate,
                "producer": str(producer),
            }:
                pass
            case _:
                raise _damaged("it lacks default, modules, ignore, bits_per_weight or producer, or has another type")
        if not all(isinstance(name, str) for name in ignore):
            raise _damaged("'ignore' is no list of names")
        if not math.isfinite(rate) or rate < 0 or isinstance(rate, bool):
            raise _damaged(f"'bits_per_weight' is {quoted(rate)}")
        specs = {}
        for name, change in modules.items():
            if not isinstance(change, dict):
                raise _damaged(f"what it says of the module {quoted(name)} is no table")
            specs[name] = CodecSpec.from_dict({**default, **change})
        common, tables = CodecSpec.from_dict(default), _tables(data.get("tables", {}))
        for spec in {common, *specs.values(), *tables.values()}:
            codec_of(spec)
        return cls(common, specs, tuple(ignore), float(rate), producer, tables)


def _tables(listed: object) -> dict[str, CodecSpec]:
    if not isinstance(listed, dict):
        raise _damaged("'tables' is no table")
    specs = {}
    for name, fields in listed.items():
        if not isinstance(fields, dict):
            raise _damaged(f"what it says of the table {quoted(name)} is no table")
        specs[name] = CodecSpec.from_dict(fields)
        if specs[name].mixing != "none":
            raise _damaged(f"the table {quoted(name)} is mixed, and rows of it are looked up")
    return specs


def _damaged(what: str) -> ArtifactError:
    return ArtifactError(
        f"The quantization_config of the artifact is damaged: {what}.", remedy="Restore its config.json."
    )


def _difference(spec: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `spec` that differ, also `mixing` where only the default has one."""
    whole = {"mixing": "none", **spec}
    return {key: value for key, value in whole.items() if value != default.get(key, "none")}
