"""The examples of the documentation that need more than to run: each number and byte of them is computed anew."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import compress
from compress.cli.main import main
from compress.quantization.modules import packed_linears
from tests import families
from tests.codecs.test_formats import compositions, decode_half, fl32
from tests.test_docs import ROOT, blocks
from tests.tiny_models import write_llama, write_text

FORMATS = ROOT / "docs" / "formats.md"
GATE = "model.layers.0.mlp.gate_proj"


def fenced(text: str, kind: str = "") -> list[str]:
    """The blocks of that kind."""
    blocks = re.findall(r"^```(\w*)\n(.*?)\n```$", text, re.DOTALL | re.MULTILINE)
    return [block for found, block in blocks if found == kind]


def run(line: str, code: int = 0) -> str:
    """What the command prints, its line ends as spaces."""
    done = CliRunner().invoke(main, line.split()[1:])
    assert done.exit_code == code, done.output
    return flat(done.output)


def flat(text: str) -> str:
    return " ".join(text.split())


def shown(value: float) -> float:
    """A float32 as a page prints it: nine digits say which."""
    return float(f"{value:.9g}")


@pytest.fixture(scope="module")
def page() -> str:
    return FORMATS.read_text(encoding="utf-8").split("\n## A worked example: a whole artifact\n")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def worked(page: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The artifact, made by the page's own lines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("worked"))
        exec(fenced(page, "python")[0], {})
        run(fenced(page)[0])
        yield Path.cwd() / "worked"


def description(page: str) -> dict[str, Any]:
    """What `quantization_config` says of the gate projection."""
    printed = json.loads("{" + fenced(page, "json")[0] + "}")["quantization_config"]
    return {**printed["default"], **printed["modules"][GATE]}


def fields(page: str) -> dict[str, bytes]:
    return {name: bytes.fromhex(value) for value, name in re.findall(r"\| `([0-9a-f ]+)` \| `(\w+)` \|", page)}


def test_the_config_of_the_worked_example(worked: Path, page: str) -> None:
    printed = json.loads("{" + fenced(page, "json")[0] + "}")["quantization_config"]
    stored = json.loads((worked / "config.json").read_text(encoding="utf-8"))
    assert stored["quantization_config"] == {**printed, "producer": f"compress {compress.__version__}"}
    assert list(stored)[-1] == "quantization_config"


def test_the_header_of_the_worked_example(worked: Path, page: str) -> None:
    raw = (worked / "model.safetensors").read_bytes()
    begin = bytes.fromhex(fenced(page)[1])
    assert raw.startswith(begin)
    length = int.from_bytes(raw[:8], "little")
    base = length + 8
    assert f"is {length:#x} = {length}, so the tensors begin at byte 8 + {length} = {base}" in page
    assert f"The file of {len(raw):,} bytes" in page
    assert f"reads `{begin[8:].decode()}`" in page
    entry = re.findall(r'\n       ("model.*)\n', page)[0]
    assert entry in raw[8:base].decode()
    first, last = json.loads("{" + entry + "}")[f"{GATE}.weight"]["data_offsets"]
    assert f"the bytes from {base} + {first} = {base + first} to {base} + {last} = {base + last}" in page
    assert raw[base + first : base + last] == b"".join(fields(page).values()) == bytes.fromhex(fenced(page)[2])


def test_the_weights_of_the_worked_example(worked: Path, page: str) -> None:
    decoded = decode_half(description(page), 2, 16, bytes.fromhex(fenced(page)[2]))
    library = packed_linears(compress.load(worked))[GATE].quantized().dequantize()
    assert library.tolist() == decoded
    assert [float(value) for value in fenced(page)[-1].split()] == [shown(value) for row in decoded for value in row]


def halves(d: int, k: int, rank: int, most: int) -> Iterator[list[int]]:
    """The lines of the page's table: d, k, rank, k', T, rank - T, a, N, b."""
    if d == 1:
        return
    half, below = d // 2, [0]
    for j in range(k):
        below.append(below[-1] + compositions(half, j, most) * compositions(half, k - j, most))
    first = max(j for j in range(k + 1) if below[j] <= rank)
    words = compositions(half, k - first, most)
    left, right = divmod(rank - below[first], words)
    yield [d, k, rank, first, below[first], rank - below[first], left, words, right]
    yield from halves(half, first, left, most)
    yield from halves(half, k - first, right, most)


def pulses_of(lines: list[list[int]], most: int) -> list[int]:
    """The composition that the lines with d = 2 name: of k pulses the first has k' of N(1, .) = 1."""
    return [each for d, k, _, first, *_ in lines if d == 2 for each in (first, k - first)]


def test_the_steps_of_the_worked_example(page: str) -> None:
    line = re.findall(r"has K = (\d+) pulses, the levels ([\d ]+) \(M = (\d+)\), the shift d = (\d+) and", page)[0]
    pulses, most, shift = int(line[0]), int(line[2]), int(line[3])
    levels = [int(level) for level in line[1].split()]
    gains = [float(gain) for gain in re.findall(r"gains: ([\d., ]+)\. N\(8", page.replace("\n", " "))[0].split(",")]
    assert len(levels) == most + 1
    words = compositions(8, pulses, most)
    codes = 2 * words * len(gains)
    assert (
        f"N(8, {pulses}) = {words}; with five gains and the coset\n{codes} codes, {codes * 100 >> 16} % of 2^16" in page
    )

    stored = fields(page)
    scale = struct.unpack("<f", stored["scale"])[0]
    assert f"s = {struct.unpack('<I', stored['scale'])[0]:#x} = {scale:.9g} |" in page
    assert f"q = {stored['rows'][0]} and {stored['rows'][1]} |" in page
    scales = [fl32(scale * fl32(2.0 ** (-(255 - q) / 16))) for q in stored["rows"]]
    assert [float(value) for value in re.findall(r"\bR = (?:fl32\(s F\) = )?([\d.]+\d)", page)] == [*map(shown, scales)]

    table = [row.strip("| ").split(" | ") for row in re.findall(r"\| \d \| \d \| `[01]+` \|.*", page)]
    values: list[int] = []
    for group, told in enumerate(table):
        rest = int.from_bytes(stored["plane_0"][2 * group : 2 * group + 2], "little")
        rank, gain = divmod(rest // 2, len(gains))
        signs, coefficient = stored["signs"][group], fl32(scales[group // 2] * fl32(gains[gain]))
        numbers = [f"{rest:#x} = {rest}", rest % 2, rest // 2, rank, gain]
        assert told[:-1] == [str(each) for each in (group, group // 2, f"`{signs:08b}`", *numbers)]
        assert float(told[-1]) == shown(coefficient)
        lines = [*halves(8, pulses, rank, most)]
        m = pulses_of(lines, most)
        parts = [((-1) ** (signs >> i & 1) * levels[m[i]], (-1) ** (rest % 2) * shift) for i in range(8)]
        values += [sum(part) for part in parts]
        if group == 0:
            steps = next(block for block in fenced(page) if block.startswith("d  k"))
            assert [[int(number) for number in row.split()] for row in steps.splitlines()[1:]] == lines
            assert f"\n    m = {' '.join(map(str, m))}\n" in page
            assert f"\n    v = {' '.join(f'{level}{moved:+}' for level, moved in parts)}\n" in page
    assert len(table) == 4
    assert [int(value) for value in re.findall(r"-?\d+", fenced(page)[-2])] == values


def test_the_programs_of_the_page_on_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("def add(a, b):\n    return a + b\n" * 200, encoding="utf-8")
    loop, divided, call, end, adapters = blocks("docs/training.md")
    scope: dict[str, Any] = {}
    exec(loop, scope)
    original = compress.load("builtin:student").state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in scope["student"].state_dict().values())
    assert moved(original, "distilled") > 0
    exec(divided, {})
    assert moved(original, "student") > 0
    exec(call.replace("builtin:python/train", "text:text.txt"), {})
    assert moved(original, "taught") > 0
    assert (tmp_path / "taught.work" / "log.jsonl").is_file()
    scope = {}
    exec(end.replace("builtin:python/val", "text:text.txt"), scope)
    assert 0 < scope["figures"]["kl_divergence"] < 1
    assert len(scope["calibration"]) == 8
    with torch.no_grad():
        ids = scope["calibration"][0]["input_ids"]
        logits = compress.load("artifact", dtype=torch.float32)(ids).logits
        assert torch.equal(logits, scope["packed"](ids).logits)
        assert not torch.equal(logits, scope["trained"](ids).logits)
    pytest.importorskip("peft", reason="the rest needs peft")
    exec(adapters, {})
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def moved(original: dict[str, torch.Tensor], folder: str) -> float:
    found = compress.load(folder).state_dict()
    assert found.keys() == original.keys()
    return max(float((found[name] - tensor).abs().max()) for name, tensor in original.items())


def test_the_plan_of_the_quickstart() -> None:
    look = (ROOT / "docs/quickstart.md").read_text(encoding="utf-8").split("\n## Look before\n")[1]
    command, printed = fenced(look)[:2]
    found = run(command)
    for line in printed.splitlines():
        if not line.startswith(("data ", "backend ")):
            assert flat(line) in found


def test_the_random_models_of_the_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL", reason="an image processor needs it")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("def add(a, b):\n    return a + b\n" * 500, encoding="utf-8")
    last = (ROOT / "docs/quickstart.md").read_text(encoding="utf-8").split("\n## A model with experts")[1]
    exec(fenced(last, "python")[0], {})
    of_experts, of_images, printed = fenced(last)
    run(of_experts.replace("builtin:python/train", "text:text.txt"))
    status = {row["status"] for row in json.loads((tmp_path / "experts-4" / "report.json").read_text())["matrices"]}
    assert "calibrated" in status
    note = re.findall(r"The plan says `([^`]+)`", last.replace("\n", " "))[0]
    assert note in run("compress plan quantize experts --bits 4")
    *_, figures = [run(line) for line in of_images.splitlines()]
    assert all(line.split()[0] in figures for line in printed.splitlines())
    assert "images 64" in figures


def test_what_the_pages_quote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    faq = flat((ROOT / "docs/faq.md").read_text(encoding="utf-8"))
    low = run("compress plan quantize builtin:student --bits 1.2", 2)
    assert re.findall(r'\("(stores this model [^"]+)"\)', faq)[0] in low
    asked, got = re.findall(r"`--bits ([\d.]+)` gives ([\d.]+) for the built-in student", faq)[0]
    assert f"{got} (asked: {asked})" in run(f"compress plan quantize builtin:student --bits {asked}")
    write_llama(tmp_path / "other", write_text(tmp_path))
    distil = (
        "compress plan distill --teacher other --student builtin:student --data text:text.txt --loss kl --context 64"
    )
    assert re.findall(r"before training: \"([^\"]+)\"", faq)[0] in run(distil, 1)
    untied = run("compress plan quantize builtin:student --bits 4 --transform hadamard --data text:text.txt")
    assert re.findall(r"with the bytes \(\"([^\"]+)\"\)", faq)[0] in untied
    families.save(families.build("Starcoder2ForCausalLM", "starcoder2"), tmp_path / "m")
    models = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    assert flat(fenced(models)[0]) in run("compress plan quantize m --bits 4")


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, place = target.partition("#")
        other = page.parent / name if name else page
        assert other.exists(), target
        if place:
            headings = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.MULTILINE)
            assert place in map(anchor, headings), target
