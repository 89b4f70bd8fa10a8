"""The tables that an artifact's configuration lists, found in the model that it is loaded as."""

from __future__ import annotations

from transformers import PreTrainedModel

from compress.codecs.base import CodecSpec
from compress.errors import ArtifactError, quoted
from compress.formats.config import QuantizationConfig
from compress.modeling.names import align_name
from compress.modeling.tables import Table, TableKind, find_tables, has_head


def tables_of(
    config: QuantizationConfig, model: PreTrainedModel, declared: bool = False
) -> list[tuple[Table, CodecSpec]]:
    """The tables of `model` that are quantized, with their specs; `declared` as in `find_tables`.

    A bare backbone lacks the head. Raises `ArtifactError` for a name that is no table of the model.
    """
    modules = {name for name, _ in model.named_modules()}
    own = {name: align_name(name, modules, model.base_model_prefix) for name in config.tables}
    found: dict[str | None, Table] = {}
    kinds: tuple[TableKind, ...] = ("embedding", "head") if has_head(model) else ("embedding",)
    for kind in kinds:
        if not set(own.values()) <= found.keys():
            tables = find_tables(model, [kind], declared=declared)
            found |= {name: table for table in tables for name in table.modules}
    listed = []
    for name, spec in config.tables.items():
        if own[name] in found:
            listed.append((found[own[name]], spec))
        elif own[name] is not None or has_head(model):
            raise ArtifactError(
                f"quantization_config lists {quoted(name)} as a table: an embedding or head that the model lacks.",
                remedy="Load the artifact with the class that config.json names in 'architectures'.",
            )
    return listed
