"""This project, through its public verb. `--setting rate=3.25` bits a weight, or `--setting width=4` for codes of that
width everywhere, `--setting codec=NAME[:key=value,...]`, `--setting transform=NAME[:key=value,...]`; with `--setting
data=none` every matrix is rounded by itself. OUT becomes a folder with the whole artifact, for a transform changes more
than the quantized maps. The true bits are counted from the payloads."""

from __future__ import annotations

from task import load, read_task
from width import rate_of

import compress
from compress.codecs import codec
from compress.quantization.modules import packed_modules
from compress.recipe.method import Method

task = read_task()
method = Method.model_validate(task.settings.get("codec", "half_pyramid"))
chosen = {"transform": task.settings["transform"]} if "transform" in task.settings else {}
calibrated = task.settings.get("data") != "none"
model = load(task.model)
rounder = codec(method.name, **method.options)
if "width" in task.settings:
    rate = rate_of(model, rounder, int(task.settings["width"]))
else:
    rate = float(task.settings.get("rate", task.bits))
with task.timed():
    compress.quantize(
        model,
        bits=rate,
        data=task.rows if calibrated else None,
        codec=rounder,
        seed=0,
        **chosen,
    )
packed = packed_modules(model)
stored = sum(8 * module.weight.nbytes for module in packed.values())
model.save_pretrained(task.out)
task.answer(
    "model-compress",
    str(method),
    bits_per_weight=stored / sum(module.out_features * module.in_features for module in packed.values()),
    rate=rate,
    calibrated=calibrated,
    **chosen,
)
