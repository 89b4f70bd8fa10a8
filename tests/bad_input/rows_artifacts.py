"""Broken artifacts: what `compress quantize` made, after an accident or on purpose."""

from __future__ import annotations

from compress.codecs import codec
from compress.errors import ArtifactError, ModelError
from tests.bad_input.damage import (
    WEIGHTS,
    Make,
    cut,
    edited,
    fields,
    file,
    flipped,
    folder,
    gone,
    header,
    header_text,
    linked,
    replaced,
    resealed,
    scale_of,
    shard_named,
    tensor,
)
from tests.bad_input.row import Row

INSPECT = "inspect broken"
EVAL = "eval broken --data text:text.txt --context 32"
EXPORT = "export broken --to onnx --out q --quiet"
OPEN = ">>> Artifact(Path('broken'))"
LOAD = ">>> AutoModelForCausalLM.from_pretrained('broken')"
UP = "model.layers.0.mlp.up_proj"
CONFIG = "'broken/config.json'"
SEAL = "compress.json"
TABLE = codec("integer").spec(8).to_dict()


def broken(
    name: str, *changes: Make, parts: tuple[str, ...], does: str = INSPECT, error: type[Exception] = ArtifactError
) -> Row:
    return Row(f"artifact: {name}", folder("quantized", *changes), does, parts, error, work=does == EXPORT)


def config(name: str, *parts: str, keys: tuple[str, ...] = (), **values: object) -> Row:
    """A field of quantization_config that is wrong."""
    change = fields("config.json", "quantization_config", *keys, **values)
    return broken(name, change, parts=(CONFIG, *parts), does=OPEN)


def payload(name: str, *parts: str, does: str = OPEN, **values: object) -> Row:
    return broken(name, tensor(f"{UP}.weight", **values), parts=("'broken'", UP, *parts), does=does)


FOLDERS = (
    Row("artifact: no folder", lambda here: None, "inspect nowhere", ("'nowhere'", "Name an artifact"), ArtifactError),
    Row(
        "artifact: an ordinary model",
        folder("student"),
        INSPECT,
        ("'broken' is not quantized", "compress quantize"),
        ArtifactError,
    ),
    broken("no config.json", gone("config.json"), parts=("'broken' has no config.json",), error=ModelError),
    broken(
        "config.json cut short", cut("config.json", lambda n: n - 9), parts=(CONFIG, "is not JSON"), error=ModelError
    ),
    broken("no weights", gone(WEIGHTS), parts=("'broken' has no model.safetensors",)),
    broken("weights cut inside the header", cut(WEIGHTS, lambda n: 100), parts=(f"'broken/{WEIGHTS}' is damaged",)),
    broken(
        "weights cut inside a payload",
        cut(WEIGHTS, lambda n: n // 2),
        parts=(f"'broken/{WEIGHTS}' is damaged", "ends at byte"),
    ),
    broken(
        "weights cut at their end",
        cut(WEIGHTS, lambda n: n - 1),
        parts=(f"'broken/{WEIGHTS}' is damaged", "ends at byte"),
    ),
    broken(
        "weights with one byte more",
        lambda here: (here / WEIGHTS).open("ab").write(b"\0"),
        parts=(f"'broken/{WEIGHTS}'",),
    ),
    broken("index that leads outside", *shard_named("../student/model.safetensors"), parts=("outside the folder",)),
)
SEALS = (
    broken(
        "one changed bit",
        flipped(WEIGHTS, lambda n: n - 5),
        parts=(f"'broken/{WEIGHTS}'", "sha256 differs", "Copy it again"),
    ),
    broken(
        "one changed bit, to be measured",
        flipped(WEIGHTS, lambda n: n - 5),
        parts=(f"'broken/{WEIGHTS}'", "sha256 differs"),
        does=EVAL,
    ),
    broken(
        "one changed bit, to be exported",
        flipped(WEIGHTS, lambda n: n - 5),
        parts=(f"'broken/{WEIGHTS}'", "sha256 differs"),
        does=EXPORT,
    ),
    broken(
        "a changed tokenizer",
        flipped("tokenizer.json", lambda n: n - 5),
        parts=("'broken/tokenizer.json'", "sha256 differs"),
    ),
    broken("a file of another size", file("README.md", "hello"), parts=("'broken/README.md'", "it has 5 bytes")),
    broken("a missing file", gone("README.md"), parts=("'broken/README.md'", "listed in compress.json and missing")),
    broken(
        "a file too many", file("extra.py", "import os"), parts=("'broken/extra.py'", "not listed", "Move it elsewhere")
    ),
    broken(
        "weights too many",
        lambda here: (here / "more.safetensors").symlink_to("model.safetensors"),
        parts=("'broken/more.safetensors'", "not listed"),
    ),
    broken("checksums cut short", cut(SEAL, lambda n: n // 2), parts=(f"'broken/{SEAL}' is damaged",)),
    broken("checksums of a list", file(SEAL, "[]"), parts=(f"'broken/{SEAL}' is damaged", "'files'")),
    broken(
        "checksums with a file twice",
        replaced(SEAL, '"files": {', '"files": {"a": {"bytes": 1, "sha256": ""}, "a": 1, '),
        parts=(f"'broken/{SEAL}'", "'a' is given twice"),
    ),
    broken(
        "checksums of another version",
        fields(SEAL, format_version=2),
        parts=(f"'broken/{SEAL}'", "version 2", "Install"),
    ),
    broken(
        "checksums with an entry that is none",
        fields(SEAL, "files", **{"config.json": 3}),
        parts=(f"'broken/{SEAL}'", "'config.json' is no file"),
    ),
    *(
        broken(
            f"checksums of {what}",
            fields(SEAL, "files", **{name: {"bytes": 1, "sha256": "0"}}),
            parts=(f"'broken/{SEAL}'", "is no file of the folder"),
        )
        for what, name in (
            ("an absolute path", "/etc/passwd"),
            ("a file above", "../student/config.json"),
            ("a path with backslashes", "..\\config.json"),
            ("a name with NUL", "a\0b"),
            ("no name", ""),
            ("the folder", "."),
            ("a name of 300 letters", "x" * 300),
        )
    ),
    broken(
        "a link that leads nowhere",
        gone("README.md"),
        linked("README.md", "../nowhere"),
        parts=("'broken/README.md'", "missing"),
    ),
    broken(
        "a report cut short",
        cut("report.json", lambda n: n // 2),
        resealed,
        parts=("'broken/report.json' is not JSON",),
    ),
    broken(
        "a report of another form",
        file("report.json", '{"matrices": 3}'),
        resealed,
        parts=("'broken/report.json' has no list of matrices",),
    ),
    broken(
        "a report with a name that is none",
        edited("report.json", lambda report: report["matrices"][2].update(name={})),
        resealed,
        parts=("'broken/report.json' has no list of matrices",),
    ),
    broken(
        "a report without figures",
        fields("report.json", matrices=...),
        resealed,
        parts=("'broken/report.json' has no list of matrices",),
    ),
    broken(
        "a report with NaN",
        replaced("report.json", '"relative_error": ', '"relative_error": NaN, "was": '),
        resealed,
        parts=("'broken/report.json'", "NaN"),
    ),
)
CONFIGS = (
    config("quantized by another", "'gptq'", "compress quantize", quant_method="gptq"),
    config("format version 2", "version 2", "producer", format_version=2),
    config("format version true", "version True", format_version=True),
    config("no default", "lacks default", default=...),
    config("modules of a list", "damaged", modules=[]),
    config("a module that is none", f"'{UP}'", "is no table", modules={UP: 3}),
    config("tables of a list", "'tables' is no table", tables=[]),
    config("a table that is none", "'lm_head' is no table", tables={"lm_head": 8}),
    config("a table that is mixed", "'lm_head' is mixed", tables={"lm_head": TABLE | {"mixing": "input"}}),
    broken(
        "a table that the model lacks",
        fields("config.json", "quantization_config", tables={"model.norm": TABLE}),
        parts=("'model.norm' as a table", "the model lacks"),
        does=OPEN,
    ),
    broken(
        "a table that is not packed",
        fields("config.json", "quantization_config", tables={"model.embed_tokens": TABLE}),
        parts=("'broken'", "model.embed_tokens", "of int8"),
        does=OPEN,
    ),
    config("ignore of a word", "damaged", ignore="lm_head"),
    config("ignore of numbers", "'ignore' is no list of names", ignore=[3]),
    config("producer of null", "damaged", producer=None),
    config("bits in words", "damaged", bits_per_weight="3"),
    config("negative bits", "'bits_per_weight' is -1", bits_per_weight=-1),
    config("an unknown codec", "'pyramide'", "newer version", keys=("default",), codec="pyramide"),
    config("no width", "lacks the field 'width'", keys=("default",), width=...),
    config("an unknown field", "'wdth'", "Restore", keys=("default",), wdth=3),
    config("a width in words", "'22' as its 'width'", keys=("default",), width="22"),
    config("a width of true", "True as its 'width'", keys=("default",), width=True),
    config("a width of 10^30", "as its 'width'", keys=("default",), width=10**30),
    config("a width of 0", "0 as its 'width'", keys=("default",), width=0),
    config("a dim of 2^40", "as its 'dim'", keys=("default",), dim=2**40),
    config("a negative dim", "-8 as its 'dim'", keys=("default",), dim=-8),
    config("a dim that is not there", "9 weights", keys=("default",), dim=9),
    config("options of a list", "as its 'options'", keys=("default",), options=[]),
    config("an option of a list", "[1] as the option 'table'", keys=("default", "options"), table=[1]),
    config("an unknown option", "half", keys=("default", "options"), colour="blue"),
    config("an unknown mixing", "'diagonal' as its 'mixing'", keys=("default",), mixing="diagonal"),
    broken(
        "NaN bits",
        fields("config.json", "quantization_config", bits_per_weight=float("nan")),
        parts=(CONFIG, "'bits_per_weight' is nan"),
        does=OPEN,
    ),
    broken(
        "a module that the model has not",
        fields("config.json", "quantization_config", modules={"model.layers.7.mlp": {}}),
        parts=("'model.layers.7.mlp'", "'architectures'"),
        does=OPEN,
    ),
    broken(
        "a key twice",
        replaced("config.json", '"quant_method"', '"format_version": 1, "quant_method"'),
        parts=(CONFIG, "'format_version' is given twice"),
        does=OPEN,
        error=ModelError,
    ),
    broken(
        "quantization_config of a list",
        fields("config.json", quantization_config=[]),
        parts=(CONFIG, "quantization_config"),
        does=OPEN,
        error=ModelError,
    ),
    broken(
        "mixed, and no signs",
        fields("config.json", "quantization_config", "default", mixing="both"),
        parts=("'broken'", "bytes of int8"),
        does=OPEN,
    ),
    broken(
        "10^12 layers",
        fields("config.json", num_hidden_layers=10**12),
        parts=(CONFIG, "1000000000000"),
        does=OPEN,
        error=ModelError,
    ),
    broken("hidden_size 10^9", fields("config.json", hidden_size=10**9), parts=("'broken'", "[300, 32]"), does=OPEN),
    broken(
        "one layer more", fields("config.json", num_hidden_layers=2), parts=("broken", "model.layers.1."), does=OPEN
    ),
    broken(
        "format version 2, loaded by transformers",
        fields("config.json", "quantization_config", format_version=2),
        parts=("version 2", "producer"),
        does=LOAD,
    ),
    broken(
        "an unknown codec, loaded by transformers",
        fields("config.json", "quantization_config", "default", codec="x"),
        parts=("'x'",),
        does=LOAD,
    ),
)
PAYLOADS = (
    payload("a payload of float32", "of F32", dtype="F32", shape=[193]),
    payload("a payload of uint8", "of U8", dtype="U8"),
    payload("a payload as a column", "[772, 1] of I8", shape=[772, 1]),
    payload("a payload as a row", "[1, 772] of I8", shape=[1, 772]),
    broken(
        "a payload cut by its header",
        header(lambda t: t[f"{UP}.weight"].update(shape=[771])),
        parts=(UP, "771 bytes"),
        does=OPEN,
    ),
    broken(
        "a payload that is missing",
        header(lambda t: t.update({"more": t.pop(f"{UP}.weight")})),
        parts=("broken", UP),
        does=OPEN,
        error=ArtifactError,
    ),
    broken(
        "a norm that is missing",
        header(lambda t: t.update({"more": t.pop("model.norm.weight")})),
        parts=("'broken'", "'model.norm.weight'"),
        does=OPEN,
    ),
    broken(
        "a norm of integers", tensor("model.norm.weight", dtype="I16"), parts=("'model.norm.weight'", "I16"), does=OPEN
    ),
    broken(
        "a header with a tensor twice",
        header_text(lambda text: text.replace(b'"model.norm.weight"', b'"lm_head.weight": 1, "lm_head.weight"')),
        parts=(f"'broken/{WEIGHTS}'", "'lm_head.weight' is given twice"),
        does=OPEN,
    ),
    broken(
        "scales of NaN",
        scale_of(f"{UP}.weight", b"\x00\x00\xc0\x7f"),
        resealed,
        parts=("'broken'", UP, "scales ('scale')", "no finite"),
    ),
    broken(
        "negative scales", scale_of(f"{UP}.weight", b"\x00\x00\x80\xbf"), resealed, parts=("'broken'", UP, "positive")
    ),
    broken(
        "scales of 3e38", scale_of(f"{UP}.weight", b"\xff\xff\x7f\x7f"), resealed, parts=("'broken'", UP, "overflow")
    ),
)
ROWS = (*FOLDERS, *SEALS, *CONFIGS, *PAYLOADS)
