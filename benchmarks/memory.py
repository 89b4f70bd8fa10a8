"""The memory of calibrated rounding: measured, planned, and what a rule of thumb allows.

    python benchmarks/memory.py [--layers 22] [--hidden 2048] [--ffn 5632] [--kv-heads 4] [--vocabulary 32000]
        [--rows 16] [--memory 2GB] [--work DIR] [--bits 3.25] [--codec half_pyramid]

Makes a Llama with random weights in bfloat16, shard by shard (1.1 G parameters by default) and with the tokenizer of
the built-in models, quantizes it in a process of its own, and samples that process's memory that no file backs (RssAnon
and RssShmem). Printed are its peak, less what the imports take; the plan's estimate; and

    2 blocks in float32 + 3 of the largest Hessian in float64 + embeddings in float32 + the hidden states' budget,

of which only as many bytes of hidden states count as there are.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from compress.modeling.loading import load_tokenizer, parameter_count, skeleton
from compress.modeling.structure import find_blocks, matrices
from compress.plan import make_plan
from compress.recipe import make_recipe
from compress.recipe.schema import parse_bytes

CHILD = """
import sys
from compress.pipeline import run
from compress.recipe import make_recipe
import compress.quantization.run, compress.codecs, json, torch, transformers
print("imported", flush=True)
sys.stdin.readline()
report = run(make_recipe(json.loads(sys.argv[1])))
print(report["bits_per_weight"], flush=True)
"""


def make_model(folder: Path, config: LlamaConfig) -> None:
    """Random weights of the size of trained ones, one shard a block."""
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    model = skeleton(config)
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in model.state_dict().items():
        key = name.split(".")[2] if ".layers." in name else "outside"
        shards.setdefault(key, {})[name] = parameter
    weight_map, total = {}, 0
    for index, (_, names) in enumerate(shards.items(), 1):
        shard = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name, parameter in names.items():
            if parameter.ndim == 1:
                tensors[name] = torch.ones(parameter.shape, dtype=torch.bfloat16)
            else:
                tensors[name] = (torch.randn(parameter.shape, generator=generator) * 0.02).to(torch.bfloat16)
            weight_map[name], total = shard, total + tensors[name].nbytes
        save_file(tensors, folder / shard, metadata={"format": "pt"})
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))


def sample(pid: int, stop: threading.Event) -> Iterator[int]:
    while not stop.is_set():
        try:
            text = Path(f"/proc/{pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return
        fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        yield sum(int(fields.get(name, "0 kB").split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))
        time.sleep(0.01)


def measure(recipe: dict[str, object]) -> tuple[int, int, float]:
    """Bytes after the imports, the peak, and seconds."""
    command = [sys.executable, "-c", CHILD, json.dumps(recipe)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline().strip() == "imported"
    baseline = next(sample(child.pid, threading.Event()))
    peak, stop = [baseline], threading.Event()

    def watch() -> None:
        for size in sample(child.pid, stop):
            peak[0] = max(peak[0], size)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    child.stdin.write("go\n")
    child.stdin.flush()
    code = child.wait()
    stop.set()
    watcher.join()
    if code:
        raise SystemExit(code)
    return baseline, peak[0], time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("layers", 22),
        ("hidden", 2048),
        ("ffn", 5632),
        ("heads", 32),
        ("kv-heads", 4),
        ("vocabulary", 32000),
        ("rows", 16),
        ("context", 256),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--memory", default="2GB")
    parser.add_argument("--bits", type=float, default=3.25)
    parser.add_argument("--codec", default="half_pyramid")
    parser.add_argument("--work", type=Path)
    given = parser.parse_args()
    config = LlamaConfig(
        hidden_size=given.hidden,
        intermediate_size=given.ffn,
        num_hidden_layers=given.layers,
        num_attention_heads=given.heads,
        num_key_value_heads=given.kv_heads,
        vocab_size=given.vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    with tempfile.TemporaryDirectory(dir=given.work) as place:
        folder = Path(place, "model")
        folder.mkdir()
        make_model(folder, config)
        load_tokenizer("builtin:teacher").save_pretrained(folder)
        recipe: dict[str, object] = {
            "model": str(folder),
            "out": str(Path(place, "out")),
            "quantize": {
                "bits": given.bits,
                "codec": given.codec,
                "data": ["builtin:python/train"],
                "rows": given.rows,
                "context": given.context,
                "memory": given.memory,
            },
        }
        plan = make_plan(make_recipe(recipe))
        baseline, peak, seconds = measure(recipe)
        model = skeleton(config)
        block = 4 * max(parameter_count(block) for _, block in find_blocks(model))
        hessian = 8 * max(view.shape[1] for view in matrices(model)) ** 2
        hidden = 4 * given.rows * given.context * given.hidden
        allowed = 2 * block + 3 * hessian + 4 * given.vocabulary * given.hidden
        allowed += min(parse_bytes(given.memory), 4 * hidden)
        assert plan.quantization is not None
        planned, taken = plan.quantization.memory_bytes, peak - baseline
        print(f"{plan.parameters:,} parameters, {given.layers} blocks, {given.rows} rows of {given.context} tokens")
        print(f"imports   {baseline / 1e6:8.1f} MB")
        print(f"measured  {taken / 1e6:8.1f} MB above them, in {seconds:.0f} s")
        print(f"planned   {planned / 1e6:8.1f} MB: measured is {taken / planned:.3f} of it")
        print(f"allowed   {allowed / 1e6:8.1f} MB: measured is {taken / allowed:.3f} of it")


if __name__ == "__main__":
    main()
