"""AutoRound: rounding and clipping learned by signed gradients, block by block. Its defaults (200 iterations, 8 rows a
step) but for bits, group, symmetry and the data."""

from __future__ import annotations

from auto_round import AutoRound
from task import linear_maps, load, read_task
from transformers import AutoTokenizer

task = read_task()
iterations = int(task.settings.get("iterations", 200))
model = load(task.model)
names = list(linear_maps(model))
rounder = AutoRound(
    model,
    AutoTokenizer.from_pretrained(task.model),
    bits=task.bits,
    group_size=task.group,
    sym=task.symmetric,
    iters=iterations,
    seqlen=task.rows.shape[1],
    nsamples=len(task.rows),
    dataset=task.rows.split(1),
    device_map="cpu",
    enable_torch_compile=False,
)
with task.timed():
    rounder.quantize()
maps = dict(rounder.model.named_modules())
task.write({name: maps[name].weight for name in names})
task.answer(
    "auto-round",
    "AutoRound",
    bits_per_weight=task.true_bits(),
    iterations=iterations,
)
