"""Broken models that a command is to quantize, plan or measure."""

from __future__ import annotations

import os

from compress.errors import ArtifactError, NumericsError
from tests.bad_input.damage import (
    INDEX,
    WEIGHTS,
    cut,
    edited,
    fields,
    file,
    folder,
    gone,
    header,
    header_text,
    in_shards,
    linked,
    replaced,
    shard_named,
    tensor,
)
from tests.bad_input.row import Row

QUANTIZE = "quantize broken --bits 3 --out q"
PLAN = "plan quantize broken --bits 3"
EVAL = "eval broken --data text:text.txt --context 32"
UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"
AGAIN = "Copy or download the file again."
DEEP = "[" * 200_000

FOLDERS = (
    Row("no such folder", lambda here: None, "quantize ./nowhere --bits 3 --out q", ("'./nowhere'", "Check the path")),
    Row(
        "a file in place of a folder",
        lambda here: None,
        "quantize text.txt --bits 3 --out q",
        ("'text.txt'", "is a file"),
    ),
    Row("an empty folder", lambda here: (here / "broken").mkdir(), QUANTIZE, ("'broken' has no config.json",)),
    Row("no config.json", folder("student", gone("config.json")), QUANTIZE, ("'broken' has no config.json",)),
    Row("no weights", folder("student", gone(WEIGHTS)), QUANTIZE, ("'broken' has no model.safetensors",)),
    Row("an empty weight file", folder("student", file(WEIGHTS, b"")), QUANTIZE, (f"'broken/{WEIGHTS}'", "0 bytes")),
    Row(
        "weights only as a pickle",
        folder("student", lambda here: (here / WEIGHTS).rename(here / "pytorch_model.bin")),
        QUANTIZE,
        ("'broken'", "pickles (pytorch_model.bin)", "save_pretrained, which writes safetensors"),
    ),
    Row(
        "pickles in several files",
        folder(
            "student",
            gone(WEIGHTS),
            file("pytorch_model-00001-of-00002.bin", b"x"),
            file("pytorch_model-00002-of-00002.bin", b"x"),
            file("pytorch_model.bin.index.json", "{}"),
        ),
        QUANTIZE,
        ("'broken'", "pytorch_model-00002-of-00002.bin", "safetensors"),
    ),
    Row("an ONNX export", folder("onnx"), QUANTIZE, ("'broken' is an ONNX export", "made from")),
    Row("an ONNX export to be measured", folder("onnx"), EVAL, ("'broken' is an ONNX export", "made from")),
    Row(
        "an ONNX export to be listed", folder("onnx"), "inspect broken", ("'broken' is an ONNX export",), ArtifactError
    ),
    Row(
        "the result of several stages",
        folder("stages"),
        QUANTIZE,
        ("'broken/distilled'", "'broken/quantized'", "one of"),
    ),
    Row("such a result to be measured", folder("stages"), EVAL, ("'broken/distilled'", "'broken/quantized'")),
    Row("such a result to be listed", folder("stages"), "inspect broken", ("'broken/quantized'", "Name one of them")),
    Row(
        "such a result to be exported",
        folder("stages"),
        "export broken --to onnx --out q",
        ("'broken/quantized'", "Name one of them"),
    ),
    Row(
        "an adapter",
        folder("student", gone("config.json"), gone(WEIGHTS), file("adapter_config.json", "{}")),
        QUANTIZE,
        ("'broken' is an adapter", "Merge it"),
    ),
    Row("a GGUF file", file("broken/model.Q4_K.gguf", b"GGUF"), QUANTIZE, ("'broken' holds a GGUF", "safetensors")),
    Row(
        "a pipe in place of the weights",
        folder("student", gone(WEIGHTS), lambda here: os.mkfifo(here / WEIGHTS)),
        QUANTIZE,
        ("'broken' has no",),
    ),
    Row(
        "a link that leads nowhere",
        folder("student", gone(WEIGHTS), linked(WEIGHTS, "/nowhere")),
        QUANTIZE,
        ("'broken' has no model.safetensors",),
    ),
)

HEADERS = (
    Row(
        "weights cut short",
        folder("student", cut(WEIGHTS, lambda n: n - 100)),
        QUANTIZE,
        (f"'broken/{WEIGHTS}' is damaged", AGAIN),
    ),
    Row(
        "cut inside the header",
        folder("student", cut(WEIGHTS, lambda n: 200)),
        QUANTIZE,
        ("too few for its header", AGAIN),
    ),
    Row("cut inside the length", folder("student", cut(WEIGHTS, lambda n: 5)), QUANTIZE, ("5 bytes", AGAIN)),
    Row(
        "bytes after the end",
        folder("student", lambda here: (here / WEIGHTS).open("ab").write(b"more")),
        QUANTIZE,
        ("its tensors end at",),
    ),
    Row("header of 2^63 bytes", folder("student", header_text(bytes, 2**63)), QUANTIZE, ("too few for its header",)),
    Row(
        "header longer than the file",
        folder("student", header_text(bytes, 10**7)),
        QUANTIZE,
        ("too few for its header",),
    ),
    Row(
        "header without end",
        folder("student", header_text(lambda text: text[:-1], None)),
        QUANTIZE,
        ("header is not JSON",),
    ),
    Row(
        "header that is no table",
        folder("student", header_text(lambda text: b"[1]")),
        QUANTIZE,
        ("header is not a table",),
    ),
    Row(
        "deep nesting in the header",
        folder("student", header_text(lambda text: DEEP.encode())),
        QUANTIZE,
        ("nested too deeply",),
    ),
    Row(
        "header that is not UTF-8",
        folder("student", header_text(lambda text: text.replace(b"norm", b"n\xffrm"))),
        QUANTIZE,
        ("not UTF-8",),
    ),
    Row(
        "a tensor twice in the header",
        folder(
            "student",
            header_text(
                lambda text: (
                    text[:-1] + b"," + f'"{NORM}": '.encode() + b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
                )
            ),
        ),
        QUANTIZE,
        (f"the key '{NORM}' is given twice",),
    ),
    Row(
        "metadata that are no texts",
        folder("student", header(lambda t: t.update(__metadata__={"a": 1}))),
        QUANTIZE,
        ("__metadata__",),
    ),
    Row("overlapping tensors", folder("student", tensor(NORM, data_offsets=[0, 64])), QUANTIZE, ("overlaps",)),
    Row("a hole between tensors", folder("student", header(lambda t: t.pop(UP))), QUANTIZE, ("hole before tensor",)),
    Row(
        "offsets that run backwards",
        folder("student", tensor(NORM, data_offsets=[64, 0])),
        QUANTIZE,
        (f"'{NORM}'", "the range 64..0"),
    ),
    Row("negative offsets", folder("student", tensor(NORM, data_offsets=[-64, 0])), QUANTIZE, ("the range -64..0",)),
    Row(
        "offsets past the end",
        folder("student", tensor(NORM, data_offsets=[10**15, 10**15 + 64])),
        QUANTIZE,
        ("ends at byte",),
    ),
    Row(
        "offsets of 2^64",
        folder("student", tensor(NORM, data_offsets=[2**64, 2**64 + 64])),
        QUANTIZE,
        ("ends at byte",),
    ),
    Row(
        "offsets with a fraction",
        folder("student", tensor(NORM, data_offsets=[0.5, 64.5])),
        QUANTIZE,
        ("is not dtype, shape and data_offsets",),
    ),
    Row(
        "one offset",
        folder("student", tensor(NORM, data_offsets=[0])),
        QUANTIZE,
        ("is not dtype, shape and data_offsets",),
    ),
    Row(
        "a field that is not in the format",
        folder("student", tensor(NORM, stride=[1])),
        QUANTIZE,
        ("is not dtype, shape and data_offsets",),
    ),
    Row(
        "a shape of another product", folder("student", tensor(NORM, shape=[33])), QUANTIZE, (f"'{NORM}' of 66 bytes",)
    ),
    Row(
        "a shape whose product overflows",
        folder("student", tensor(NORM, shape=[2**40, 2**40])),
        QUANTIZE,
        ("has shape",),
    ),
    Row(
        "a shape of 2^63",
        folder("student", tensor(NORM, shape=[2**63, 0], data_offsets=[0, 0])),
        QUANTIZE,
        ("has shape",),
    ),
    Row(
        "a shape of 2^40 x 0",
        folder("student", tensor(NORM, shape=[2**40, 0], data_offsets=[0, 0])),
        QUANTIZE,
        ("its tensors end at",),
    ),
    Row("a shape of 10^5 extents", folder("student", tensor(NORM, shape=[1] * 10**5)), QUANTIZE, ("has shape", "...")),
    Row("extents of 4000 digits", folder("student", tensor(NORM, shape=[10**4000] * 100)), QUANTIZE, ("has shape",)),
    Row("a negative extent", folder("student", tensor(NORM, shape=[-32])), QUANTIZE, ("has shape [-32]",)),
    Row("two negative extents", folder("student", tensor(NORM, shape=[-8, -4])), QUANTIZE, ("has shape [-8, -4]",)),
    Row("an extent of true", folder("student", tensor(NORM, shape=[32, True])), QUANTIZE, ("has shape [32, True]",)),
    Row("an extent with a fraction", folder("student", tensor(NORM, shape=[32.0])), QUANTIZE, ("has shape [32.0]",)),
    Row(
        "an extent of NaN",
        folder("student", header_text(lambda text: text.replace(b"[32]", b"[NaN]", 1))),
        QUANTIZE,
        ("NaN is no finite number",),
    ),
    Row("an extent in words", folder("student", tensor(NORM, shape=["32"])), QUANTIZE, ("has shape ['32']",)),
    Row(
        "an unknown dtype",
        folder("student", tensor(NORM, dtype="F4")),
        QUANTIZE,
        (f"'{NORM}'", "dtype 'F4'", "Save the model"),
    ),
    Row(
        "a dtype that is a number",
        folder("student", tensor(NORM, dtype=16)),
        QUANTIZE,
        ("is not dtype, shape and data_offsets",),
    ),
    Row(
        "weights stored as integers",
        folder("student", tensor(UP, dtype="I16")),
        QUANTIZE,
        (f"'{UP}'", "I16", "original model"),
    ),
    Row("weights of integers to be measured", folder("student", tensor(UP, dtype="I16")), EVAL, (f"'{UP}'", "I16")),
    Row(
        "a transposed weight",
        folder("student", tensor(UP, shape=[32, 64])),
        QUANTIZE,
        (f"'{UP}'", "[32, 64]", "[64, 32]"),
    ),
    Row(
        "a transposed weight to be measured",
        folder("student", tensor(UP, shape=[32, 64])),
        EVAL,
        ("[32, 64]", "[64, 32]"),
    ),
    Row(
        "a weight under another name",
        folder("student", header(lambda t: t.update({"\x1b[2Jup": t.pop(UP)}))),
        QUANTIZE,
        (f"'{UP}'",),
    ),
    Row(
        "such a weight to be measured",
        folder("student", header(lambda t: t.update({"\x1b[2Jup": t.pop(UP)}))),
        EVAL,
        (f"'{UP}'",),
    ),
    Row(
        "a name with half a character",
        folder("student", header(lambda t: t.update({"up\ud800": t.pop(UP)}))),
        QUANTIZE,
        ("half of a character",),
    ),
    Row(
        "a name that steers the terminal",
        folder("student", header(lambda t: t.update({"\x1b[2J\nerror: ": {**t.pop(UP), "dtype": "F4"}}))),
        QUANTIZE,
        ("'\\x1b[2J\\nerror: '",),
    ),
)

INDEXES = (
    *(
        Row(
            f"index names {what}", folder("student", *shard_named(shard)), QUANTIZE, (f"'broken/{INDEX}' names", *parts)
        )
        for what, shard, parts in (
            ("an absolute path", "/etc/passwd", ("outside the folder", "Do not use it")),
            ("a file above", "../student/model.safetensors", ("outside the folder",)),
            ("a folder inside", "sub/model.safetensors", ("outside the folder",)),
            ("a path with backslashes", "..\\model.safetensors", ("outside the folder",)),
            ("a name with NUL", "model\x00.safetensors", ("'model\\x00.safetensors'", "outside")),
            ("a name of two lines", "a\nerror: b.safetensors", ("'a\\nerror: b.safetensors'", "outside")),
            ("nothing", "", ("''",)),
            ("a name of 300 letters", "x" * 300 + ".safetensors", ("outside the folder",)),
            ("the folder itself", ".", ("outside the folder",)),
            ("the folder above", "..", ("'..'",)),
            ("a pickle", "pytorch_model.bin", ("no safetensors file", "save_pretrained")),
            ("a file that is missing", "model-00003-of-00003.safetensors", ("is missing", "Copy the whole folder")),
        )
    ),
    Row(
        "a shard that is a folder",
        folder("student", *shard_named("a.safetensors"), lambda here: (here / "a.safetensors").mkdir()),
        QUANTIZE,
        ("'a.safetensors'", "is missing"),
    ),
    Row(
        "a shard that is a link to nowhere",
        folder("student", *shard_named("a.safetensors"), linked("a.safetensors", "../../../nowhere")),
        QUANTIZE,
        ("'a.safetensors'", "is missing"),
    ),
    Row(
        "a shard cut short",
        folder("student", in_shards, cut("model-00002-of-00002.safetensors", lambda n: n - 10)),
        QUANTIZE,
        ("'broken/model-00002-of-00002.safetensors' is damaged", AGAIN),
    ),
    Row(
        "index is not JSON",
        folder("student", in_shards, cut(INDEX, lambda n: n - 3)),
        QUANTIZE,
        (f"'broken/{INDEX}' is not JSON",),
    ),
    Row("index is a list", folder("student", in_shards, file(INDEX, "[]")), QUANTIZE, ("no table 'weight_map'",)),
    Row(
        "index without tensors",
        folder("student", in_shards, fields(INDEX, weight_map={})),
        QUANTIZE,
        ("no table 'weight_map'",),
    ),
    Row(
        "index that maps to numbers",
        folder("student", in_shards, fields(INDEX, "weight_map", lm=3)),
        QUANTIZE,
        ("no table 'weight_map'",),
    ),
    Row(
        "a tensor twice in the index",
        folder(
            "student", in_shards, replaced(INDEX, '"weight_map": {', f'"weight_map": {{"{NORM}": "a.safetensors", ')
        ),
        QUANTIZE,
        (f"'{NORM}' is given twice",),
    ),
    Row("deep nesting in the index", folder("student", in_shards, file(INDEX, DEEP)), QUANTIZE, ("nested too deeply",)),
    Row(
        "index of another version",
        folder("student", in_shards, fields(INDEX, "weight_map", **{"a.weight": "model-00001-of-00002.safetensors"})),
        QUANTIZE,
        ("'a.weight'", "it is not there"),
    ),
    Row(
        "a tensor in two shards",
        folder(
            "student",
            in_shards,
            header(
                lambda t: t.update({NORM: t.pop(min(t, key=lambda name: (name == "__metadata__", name)))}),
                "model-00001-of-00002.safetensors",
            ),
        ),
        QUANTIZE,
        ("two shards",),
    ),
)


def config(name: str, parts: tuple[str, ...], **values: object) -> Row:
    """A field of config.json that is wrong."""
    return Row(f"config: {name}", folder("student", fields("config.json", **values)), PLAN, parts)


CONFIG = "'broken/config.json'"
CONFIGS = (
    Row("config: cut short", folder("student", cut("config.json", lambda n: n // 2)), PLAN, (CONFIG, "is not JSON")),
    Row("config: empty", folder("student", file("config.json", b"")), PLAN, (CONFIG, "is not JSON")),
    Row("config: a list", folder("student", file("config.json", "[]")), PLAN, (CONFIG, "not a JSON object")),
    Row("config: not UTF-8", folder("student", file("config.json", b'{"a": "\xff"}')), PLAN, (CONFIG, "not UTF-8")),
    Row(
        "config: a key twice",
        folder("student", replaced("config.json", "{", '{"hidden_size": 64, ')),
        PLAN,
        (CONFIG, "'hidden_size' is given twice"),
    ),
    Row(
        "config: deep nesting",
        folder("student", file("config.json", '{"a": ' + DEEP)),
        PLAN,
        (CONFIG, "nested too deeply"),
    ),
    Row(
        "config: a number of 5000 digits",
        folder("student", replaced("config.json", '"hidden_size": 32', '"hidden_size": ' + "9" * 5000)),
        PLAN,
        (CONFIG, "digits"),
    ),
    config("no model_type", (CONFIG, "model_type None"), model_type=...),
    config("unknown model_type", (CONFIG, "'lama'"), model_type="lama"),
    config("model_type is a list", (CONFIG, "['llama']"), model_type=["llama"]),
    config("model_type of another family", ("'broken'",), model_type="bert"),
    config("hidden_size 0", ("broken",), hidden_size=0),
    config("hidden_size -32", ("broken",), hidden_size=-32),
    config("hidden_size in words", ("broken", "hidden_size"), hidden_size="32"),
    config("hidden_size with a fraction", ("broken", "hidden_size"), hidden_size=32.5),
    config("hidden_size 10^9", ("'broken'", "[300, 32]"), hidden_size=10**9),
    config("hidden_size 10^18", ("broken",), hidden_size=10**18),
    config("no heads", ("broken",), num_attention_heads=0),
    config("more heads than channels", (CONFIG, "multiple"), num_attention_heads=64),
    config("no layers", (CONFIG, "'num_hidden_layers'"), num_hidden_layers=0),
    config("-1 layers", ("broken",), num_hidden_layers=-1),
    config("two layers of one", ("'broken'", "model.layers.1."), num_hidden_layers=2),
    config("10^12 layers", (CONFIG, "1000000000000", "'num_hidden_layers'", "2048"), num_hidden_layers=10**12),
    config("10^12 labels", (CONFIG, "'num_labels'"), num_labels=10**12),
    config("NaN layers", ("broken",), num_hidden_layers=float("nan")),
    config("vocab_size 10^9", ("'broken'", "model.embed_tokens.weight", "[300, 32]"), vocab_size=10**9),
    config("vocab_size of null", ("broken",), vocab_size=None),
    config("intermediate_size of another model", ("'broken'", "[64, 32]", "[48, 32]"), intermediate_size=48),
    config("an unknown activation", ("broken",), hidden_act="sillu"),
    config("architectures of another family", ("'BertModel'",), architectures=["BertModel"]),
    config("architectures in words", ("broken",), architectures="LlamaForCausalLM"),
    config("architectures of numbers", ("broken",), architectures=[3]),
    config("an architecture nobody knows", ("'LamaForCausalLM'",), architectures=["LamaForCausalLM"]),
    config(
        "code of the model's own",
        ("broken", "trust_remote_code"),
        model_type="mine",
        auto_map={"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"},
    ),
    config("an unknown rotation", ("broken",), rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}),
    *(
        Row(
            f"already quantized: {method}",
            folder("student", fields("config.json", quantization_config={"quant_method": method, **rest})),
            QUANTIZE,
            ("'broken' is already quantized", f"'{method}'", "original"),
        )
        for method, rest in (
            ("gptq", {"bits": 4}),
            ("awq", {"bits": 4}),
            ("bitsandbytes", {"load_in_4bit": True}),
            ("compressed-tensors", {"format": "pack-quantized"}),
            ("fp8", {}),
            ("hqq", {}),
        )
    ),
    Row(
        "already quantized: by compress", folder("quantized"), QUANTIZE, ("'broken' is already quantized", "'compress'")
    ),
    Row(
        "already quantized: in a word",
        folder("student", fields("config.json", quantization_config="gptq")),
        QUANTIZE,
        ("broken", "gptq"),
    ),
    Row("weights: NaN", folder("nan"), QUANTIZE, (UP, "NaN", "earlier one"), error=NumericsError, work=True),
)

TOKENIZERS = (
    Row(
        "weights: no tokenizer",
        folder("student", gone("tokenizer*")),
        EVAL,
        ("'broken' has no tokenizer", "save_pretrained"),
    ),
    Row(
        "weights: tokenizer cut short",
        folder("student", cut("tokenizer.json", lambda n: n // 2)),
        EVAL,
        ("'broken'", "cannot read"),
    ),
    Row(
        "weights: tokenizer of another form",
        folder("student", file("tokenizer.json", "[]")),
        EVAL,
        ("'broken'", "cannot read"),
    ),
    Row(
        "weights: tokenizer config cut short",
        folder("student", cut("tokenizer_config.json", lambda n: n // 2)),
        EVAL,
        ("'broken'", "cannot read"),
    ),
    Row(
        "weights: tokenizer with more tokens than the model",
        folder("student", edited("tokenizer.json", lambda t: t["model"]["vocab"].update({"zzzz": 10**6}))),
        "distill --student broken --teacher teacher --data text:text.txt --loss kl --context 32 --steps 1 --out q",
        ("broken", "token"),
    ),
)

ROWS = (*FOLDERS, *HEADERS, *INDEXES, *CONFIGS, *TOKENIZERS)
