"""Broken recipes, data, places and words: what a person writes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import click

from compress.errors import DataError, ModelError, NumericsError, RecipeError, UsageError, WorkspaceError
from tests.bad_input.damage import Make, cut, fields, file, folder, linked, several
from tests.bad_input.row import Row

RUN = "run bad.yaml"
EVAL = "eval student --context 32 --data "
CALIBRATED = "quantize student --bits 3 --data text:text.txt --rows 4 --context 32 --out q"
DISTILL = (
    "distill --student {student} --teacher {teacher} --data {data} --loss {loss} --context 32 --batch-size 2 --steps 2 "
    "--out q"
)
LAUGHS = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


def distill(student: str = "student", teacher: str = "teacher", data: str = "text:text.txt", loss: str = "kl") -> str:
    return DISTILL.format(student=student, teacher=teacher, data=data, loss=loss)


def recipe(name: str, text: str | bytes, *parts: str) -> Row:
    return Row(f"recipe: {name}", file("bad.yaml", text), RUN, parts, RecipeError, 2)


HEAD = "model: student\nout: q\n"
RECIPES = (
    Row(
        "recipe: missing",
        lambda here: None,
        "run missing.yaml",
        ("'missing.yaml'", "comes with the package"),
        RecipeError,
        2,
    ),
    Row("recipe: missing, to be planned", lambda here: None, "plan missing.yaml", ("'missing.yaml'",), RecipeError, 2),
    Row(
        "recipe: a folder",
        lambda here: None,
        "run student",
        ("'student' is a folder", "Name a recipe file"),
        RecipeError,
        2,
    ),
    Row("recipe: not UTF-8", file("bad.yaml", b"model: \xff\n"), RUN, ("'bad.yaml' is not UTF-8",), RecipeError, 2),
    Row(
        "recipe: a weight file",
        lambda here: None,
        "run student/model.safetensors",
        ("'student/model.safetensors'",),
        RecipeError,
        2,
    ),
    recipe("empty", "", "bad.yaml", "Begin with"),
    recipe("a list", "- model: student\n", "bad.yaml", "is a mapping of keys", "Begin with"),
    recipe("a word", "quantize\n", "bad.yaml", "is a mapping of keys"),
    recipe("not YAML", HEAD + "quantize: {bits: 3\n", "bad.yaml:4: this is no YAML", "Correct the line"),
    recipe("a tab", HEAD + "quantize:\n\tbits: 3\n", "bad.yaml:4: this is no YAML"),
    recipe("control characters", HEAD + "quantize: {bits: \x07}\n", "bad.yaml", "no YAML"),
    recipe("NUL", b"model: \0", "bad.yaml", "no YAML"),
    recipe("two documents", HEAD + "---\nmodel: teacher\n", "bad.yaml:3", "another document"),
    recipe(
        "a tag that runs code",
        "model: !!python/object/apply:os.system [id]\n",
        "bad.yaml:1",
        "python/object/apply:os.system",
    ),
    recipe("a tag that does not fit", HEAD + "quantize: {bits: !!int three}\n", "bad.yaml", "Remove the tag"),
    recipe("a date", HEAD + "quantize: {bits: 2026-01-01}\n", "bad.yaml:3", "'timestamp'"),
    recipe("aliases that grow", LAUGHS, "bad.yaml:1: an alias refers to this", "Write the value out"),
    recipe("an alias to itself", "model: &m [*m]\n", "bad.yaml:1: an alias"),
    recipe("deep nesting", "model: " + "[" * 1500, "bad.yaml: it is nested too deeply"),
    recipe("a key that is a list", "? [model]\n: student\n", "bad.yaml:1: a key is no word"),
    recipe(
        "a key twice",
        "model: student\nmodel: teacher\n",
        "bad.yaml:2: the key 'model' is already given in line 1",
        "Keep one",
    ),
    recipe("a number of 6000 digits", HEAD + f"quantize: {{bits: {'9' * 6000}}}\n", "bad.yaml:3", "6000 digits"),
    recipe("300 kB", "# " + "x" * 300_000, "'bad.yaml' has more than", "a few lines"),
    recipe(
        "an unknown key", HEAD + "quantise: {bits: 3}\n", "bad.yaml:3: unknown key 'quantise'. Did you mean 'quantize'?"
    ),
    recipe(
        "an unknown key inside",
        HEAD + "quantize:\n  bits: 3\n  codek: pyramid\n",
        "bad.yaml:5: unknown key 'quantize.codek'. Did you mean 'codec'?",
    ),
    recipe(
        "a word for a number",
        HEAD + "quantize:\n  bits: three\n",
        "bad.yaml:4: 'quantize.bits' is 'three'. Allowed: a valid number.",
    ),
    recipe(
        "a mapping for a number",
        HEAD + "quantize:\n  bits: {a: {b: 1}}\n",
        "bad.yaml:4: 'quantize.bits' is a mapping of a. Allowed",
    ),
    recipe("a number for a mapping", HEAD + "quantize: 3\n", "bad.yaml:3: 'quantize' is 3. Allowed"),
    recipe("nothing for a mapping", HEAD + "quantize:\n", "bad.yaml"),
    recipe("NaN bits", HEAD + "quantize: {bits: .nan}\n", "bad.yaml:3: 'quantize.bits'"),
    recipe("1e999 bits", HEAD + "quantize: {bits: 1e999}\n", "bad.yaml:3: 'quantize.bits'"),
    recipe("nothing to do", HEAD, "bad.yaml", "at least one of"),
    recipe("no out", "model: student\nquantize: {bits: 3}\n", "bad.yaml: the key 'out' is missing"),
    recipe("version 9", HEAD + "version: 9\nquantize: {bits: 3}\n", "bad.yaml:3: 'version'"),
    Row(
        "recipe: --set of an unknown key",
        lambda here: None,
        "run demo --set quantize.bit=3",
        ("Did you mean 'bits'?",),
        RecipeError,
        2,
    ),
    Row(
        "recipe: --set without a value",
        lambda here: None,
        "run demo --set quantize.bits",
        ("sets nothing", "Write --set"),
        RecipeError,
        2,
    ),
)


def data(name: str, spec: str, *parts: str, make: Make | None = None, does: str = EVAL) -> Row:
    return Row(f"data: {name}", make or (lambda here: None), does + spec, parts, DataError)


DATA = (
    data("missing", "text:no.txt", "no file 'no.txt'", "Check the path"),
    data("missing, for training", "", "no file 'no.txt'", does=distill(data="text:no.txt")),
    data("missing, for calibration", "", "no file 'no.txt'", does=CALIBRATED.replace("text.txt", "no.txt")),
    data("empty", "text:bad.txt", "'bad.txt'", "holds no text", make=file("bad.txt", "")),
    data("blanks", "text:bad.txt", "'bad.txt'", "no text", make=file("bad.txt", " \n\n")),
    data("too short", "text:bad.txt", "fewer than one window of 32", make=file("bad.txt", "def return")),
    data(
        "not UTF-8", "text:bad.txt", "'bad.txt' is not UTF-8", "Convert it", make=file("bad.txt", "é".encode("latin-1"))
    ),
    data("a binary file", "text:student/model.safetensors", "'student/model.safetensors' is not UTF-8"),
    data("a folder", "text:student", "'student'", "is a folder"),
    data("no kind", "text.txt", "text:FILE"),
    data("nothing of the kind", "nothing", "nothing"),
    data("JSON cut short", "json:bad.json#text", "'bad.json' is neither", make=file("bad.json", '[{"text": "a"')),
    data("JSON of deep nesting", "json:bad.json#text", "'bad.json'", make=file("bad.json", "[" * 100_000)),
    data(
        "JSON without the field",
        "json:bad.json#text",
        "'bad.json'",
        "'text'",
        "body",
        make=file("bad.json", '[{"body": "x"}]'),
    ),
    data("JSON of numbers", "json:bad.json#text", "'bad.json'", make=file("bad.json", "[1, 2]")),
    data("an empty JSON list", "json:bad.json#text", "bad.json", make=file("bad.json", "[]")),
    data(
        "CSV without the column",
        "csv:bad.csv#text",
        "'bad.csv'",
        "'text'",
        "title, body",
        make=file("bad.csv", "title,body\nx,y\n"),
    ),
    data("CSV with a short row", "csv:bad.csv#body", "'bad.csv'", "1 columns", make=file("bad.csv", "title,body\nx\n")),
    data(
        "CSV with a quote left open",
        "csv:bad.csv#body",
        "'bad.csv'",
        "quote",
        make=file("bad.csv", 'title,body\nx,"y\nz,w\n'),
    ),
)


def usage(name: str, words: str, *parts: str, error: type[Exception] = UsageError, make: Make | None = None) -> Row:
    return Row(f"words: {name}", make or (lambda here: None), words, parts, error, 2)


WORDS = (
    Row(
        "words: no such built-in model",
        lambda here: None,
        "quantize builtin:nobody --bits 3 --out q",
        ("'nobody'", "There are:"),
    ),
    usage("0.5 bits", "quantize student --bits 0.5 --out q", "bits a weight", "Name a rate between"),
    usage("6 bits of a codec that has 5", "quantize student --bits 6 --out q", "not in 6", "the codec integer"),
    usage(
        "an allocation without data",
        "quantize student --bits 3 --allocation sensitivity --out q",
        "needs data (--data)",
        error=RecipeError,
    ),
    usage("no such allocation", f"{CALIBRATED} --allocation sensitive", "'sensitive'", "sensitivity"),
    usage("an allocation by no rows", f"{CALIBRATED} --allocation sensitivity:rows=0", "rows=0", "at least 1"),
    usage(
        "a table for nothing",
        "quantize student --bits 3 --table t --out q",
        "needs the allocation sensitivity or evolve",
        error=RecipeError,
    ),
    usage(
        "a first block that takes all", "quantize student --bits 1.8 --first-bits 5 --out q", "leave", "--first-bits"
    ),
    usage(
        "a last block of no rate", "quantize student --bits 3 --last-bits 0.2 --out q", "the last block", "not in 0.2"
    ),
    usage(
        "rates without a table",
        f"plan {CALIBRATED} --allocation sensitivity --sweep 2:4:1",
        "no table in 'q.work/table'",
        "Quantize once",
    ),
    usage(
        "rates of an allocation that measures nothing",
        "plan quantize student --sweep 2:4:1",
        "--allocation sensitivity",
    ),
    usage(
        "rates in the wrong order", f"plan {CALIBRATED} --allocation sensitivity --sweep 4:2:1", "'4:2:1'", "FIRST:LAST"
    ),
    usage("99 bits", "quantize student --bits 99 --out q", "quantize.bits", error=RecipeError),
    usage("NaN bits", "quantize student --bits nan --out q", "quantize.bits", error=RecipeError),
    usage("bits in words", "quantize student --bits three --out q", "three", error=click.BadParameter),
    usage(
        "9 bits of embedding",
        "quantize student --bits 3 --embedding-bits 9 --out q",
        "quantize.embedding_bits",
        error=RecipeError,
    ),
    usage(
        "two rates of a tied table",
        "quantize student --bits 3 --embedding-bits 4 --head-bits 8 --out q",
        "one matrix ('model.embed_tokens.weight')",
        "--head-bits 8 are two rates",
        "Give one of the two",
    ),
    Row(
        "words: bits of a head that is not there",
        folder("student", fields("config.json", architectures=["LlamaModel"])),
        "plan quantize broken --bits 3 --head-bits 8",
        ("LlamaModel has no output head", "Leave out --head-bits"),
    ),
    Row(
        "words: an embedding of few bits to bitsandbytes",
        file("bad.yaml", HEAD + "quantize: {codec: nf4, embedding_bits: 8}\nexport: [{to: bitsandbytes}]\n"),
        RUN,
        ("bitsandbytes has no quantized embeddings", "Leave out quantize.embedding_bits"),
        UsageError,
        2,
    ),
    usage("an unknown codec", "quantize student --bits 3 --codec pyramide --out q", "Did you mean 'pyramid'?"),
    usage("an option of no codec", "quantize student --bits 3 --codec pyramid:size=16 --out q", "'size'", "It takes"),
    usage(
        "a codec that is cut", "quantize student --bits 3 --codec pyramid: --out q", "NAME:key=value", error=RecipeError
    ),
    usage("an unknown rounding", f"{CALIBRATED} --rounding gptq", "no rounding 'gptq'"),
    usage("a misspelt option", f"{CALIBRATED} --rounding ldlq:swep=2", "Did you mean 'sweeps'?"),
    usage("negative damping", f"{CALIBRATED} --rounding ldlq:damping=-1", "Damping is 0 or more"),
    usage("data without use", f"{CALIBRATED} --rounding nearest", "nearest uses no data", error=RecipeError),
    usage("memory in words", f"{CALIBRATED} --memory much", "500MB", error=RecipeError),
    usage("an unknown transform", f"{CALIBRATED} --transform fourier", "hadamard"),
    usage("no rows", f"{CALIBRATED} --rows 0", "rows", error=RecipeError),
    usage(
        "rounding without data",
        "quantize student --bits 3 --rounding ldlq --out q",
        "ldlq needs data",
        error=RecipeError,
    ),
    usage("an unknown device", f"{distill()} --device gpu", "device 'gpu'"),
    usage("an unknown loss", distill(loss="kll"), "Did you mean 'kl'?"),
    usage("an option of no loss", distill(loss="kl:temp=2"), "temperature"),
    usage("a temperature in words", distill(loss="kl:temperature=hot"), "temperature"),
    usage("a context that is too long", f"{distill()} --context 65", "--context 64"),
    usage(
        "no teacher",
        "distill --student student --data text:text.txt --loss kl --context 32 --out q",
        "needs a teacher",
        error=UsageError,
    ),
    usage("a context of one", "eval student --data text:text.txt --context 1", "context", error=UsageError),
    usage("an unknown list", "list colours", "colours", error=click.BadParameter),
    usage("an unknown command", "bench q", "bench", error=click.exceptions.NoSuchCommand),
    usage("a plan of a command without one", "plan export q", "`compress export` has no plan", error=click.UsageError),
    usage("a plan of a run that is missing", "plan run missing.yaml", "'missing.yaml'", error=RecipeError),
    Row(
        "words: an encoder to be trained",
        lambda here: None,
        distill(student="encoder"),
        ("'encoder'", "not a causal language model"),
    ),
    Row(
        "words: an encoder to learn from",
        lambda here: None,
        distill(teacher="encoder"),
        ("'encoder'", "not a causal language model"),
    ),
    Row(
        "words: a student with fewer outputs than tokens",
        lambda here: None,
        distill(student="narrow"),
        ("290 outputs",),
    ),
    Row(
        "words: a student that is quantized",
        lambda here: None,
        distill(student="quantized"),
        ("'quantized' is already quantized",),
    ),
    Row(
        "words: a student without tokenizer",
        folder("student", lambda here: [path.unlink() for path in here.glob("tokenizer*")]),
        distill(student="broken"),
        ("'broken'", "save_pretrained"),
        work=True,
    ),
)


def taken(here: Path) -> None:
    (here / "taken").mkdir()
    (here / "taken" / "thesis.tex").write_text("years of work")


def other_run(here: Path) -> None:
    """The work folder that the same command at another rate left."""
    shutil.copytree((here / "work").resolve(), here / "q.work")


QUANTIZE = "quantize student --bits 3 --out"


def place(
    name: str, make: Callable[[Path], object], words: str, *parts: str, error: type[Exception] = UsageError
) -> Row:
    code = error.exit_code if issubclass(error, UsageError | WorkspaceError | ModelError) else 2
    return Row(f"place: {name}", make, words, parts, error, code)


MEASURES = (
    Row(
        "words: NaN weights to be measured",
        lambda here: None,
        "eval nan --data text:text.txt --context 32",
        ("nan",),
        NumericsError,
    ),
    Row(
        "words: NaN weights to be trained",
        lambda here: None,
        distill(student="nan"),
        ("of the student 'nan'", "NaN", "earlier one"),
        NumericsError,
        work=True,
    ),
    Row(
        "words: a damaged teacher",
        folder("teacher", cut("model.safetensors", lambda n: n - 100)),
        distill(teacher="broken"),
        ("'broken/model.safetensors' is damaged",),
    ),
)
PLACES = (
    place("a file", lambda here: None, f"{QUANTIZE} text.txt", "'text.txt' exists and is no folder", "another --out"),
    place("a file in the way", lambda here: None, f"{QUANTIZE} text.txt/q", "text.txt", error=WorkspaceError),
    place("somebody's folder", taken, f"{QUANTIZE} taken", "'taken'", "Name another --out"),
    place(
        "somebody's folder, to be replaced",
        taken,
        f"{QUANTIZE} taken --restart",
        "'taken' holds something that compress did not write",
    ),
    place(
        "an older result",
        lambda here: shutil.copytree((here / "quantized").resolve(), here / "q"),
        f"{QUANTIZE} q",
        "'q'",
        "--restart",
    ),
    place("inside the model", folder("student"), "quantize broken --bits 3 --out broken/q", "'broken'", "overlap"),
    place("the model itself", folder("student"), "quantize broken --bits 3 --out broken", "'broken'"),
    place("the present folder", lambda here: None, f"{QUANTIZE} .", "'.' cannot be the result", "folder of its own"),
    place(
        "a work folder that is none",
        lambda here: None,
        f"{QUANTIZE} q --work teacher",
        "'teacher' is not empty and no work folder",
        error=WorkspaceError,
    ),
    place("a file as work folder", file("q.work", "x"), f"{QUANTIZE} q", "q.work", error=WorkspaceError),
    place(
        "the work folder of another run",
        other_run,
        f"{QUANTIZE} q",
        "'q.work'",
        "quantize.bits was 4.0 and is now 3.0",
        "--restart",
        error=WorkspaceError,
    ),
    place(
        "a damaged work folder",
        several(other_run, file("q.work/manifest.json", "{")),
        "quantize student --bits 4 --out q",
        "'q.work/manifest.json' is damaged",
        "--restart",
        error=WorkspaceError,
    ),
    place(
        "a work folder whose list is none",
        several(other_run, file("q.work/manifest.json", "[]")),
        "quantize student --bits 4 --out q",
        "'q.work/manifest.json' is damaged",
        error=WorkspaceError,
    ),
    place("a link to nowhere as result", linked("q", "/nowhere/at/all"), f"{QUANTIZE} q", "'q'"),
)
ROWS = (*RECIPES, *DATA, *WORDS, *MEASURES, *PLACES)
