"""What `test_processes` runs in one and in two processes: `python -m tests.quantization.in_processes FOLDER NAME`.

Every case makes an artifact FOLDER/NAME-case. On stdout is what else was found, as JSON.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import compress
from compress.codecs import codec
from compress.codecs.base import Codec
from compress.distributed import World, joined
from compress.errors import CompressError, NumericsError
from compress.events import Event, Events
from compress.quantization.allocation import Evolve, Rates, Sensitivity, uniform
from compress.quantization.allocation.checkpoint import Spending
from compress.quantization.hessian import Moments
from compress.quantization.options import Ldlq, Nearest, Rounding
from compress.quantization.rounders import CalibratedRounder, CalibrationOptions
from compress.quantization.run import quantize_checkpoint
from compress.quantization.target import open_target
from compress.quantization.transforms import parse_transform
from compress.workspace import Workspace
from tests import families

HALF, INTEGER, NF4 = codec("half_pyramid"), codec("integer", group=16), codec("nf4")
IDS = families.token_ids(8, 40)
BATCHES = [{"input_ids": part} for part in IDS.split([3, 1] * 10)]
"""More than there are chunks, of two sizes."""
SMALL: dict[str, Any] = {"hidden_size": 80, "intermediate_size": 136, "num_attention_heads": 4}
"""Rows for two pieces, one of them short."""
LEARN = "ost:steps=3,batch=4"


class Killed(BaseException):
    """What stands for a kill of all processes."""


def models(folder: Path) -> None:
    families.save(families.llama(num_hidden_layers=3, **SMALL), folder / "llama")
    families.save(families.build("MixtralForCausalLM", "mixtral", num_hidden_layers=1), folder / "mixtral")


def quantize(
    source: Path,
    out: Path,
    method: Codec,
    bits: float,
    rounding: Rounding,
    transform: str = "none",
    data: Sequence[Any] = BATCHES,
    heard: list[Event] | None = None,
    allocation: Sensitivity | Evolve | None = None,
) -> dict[str, Any]:
    chosen = parse_transform(transform)
    target = open_target(source, transform=chosen)
    specs = uniform(target.views, method, bits, target.mixing)
    listeners = [] if heard is None else [heard.append]
    with Workspace.open(out.with_name(f"{out.name}.work"), {}, events=Events(listeners)) as work:
        options = CalibrationOptions(list(data), rounding)
        spending = None
        if allocation is not None:
            spending = Spending(Rates(bits), allocation, method, options, work.folder / "table", {})
        return quantize_checkpoint(
            source, out, specs, method, work, work.events, calibration=options, transform=chosen, spending=spending
        )


CASES: dict[str, tuple[Any, ...]] = {
    "pyramid": ("llama", HALF, 3.25, Ldlq(), "hadamard"),
    "integer": ("llama", INTEGER, 4.9, Ldlq(asymmetric=1.0)),
    "best": ("llama", HALF, 3.25, Ldlq(gain="best", sequential="block", refit=True)),
    "nf4": ("llama", NF4, 4.5, Ldlq()),
    "experts": ("mixtral", INTEGER, 4.9, Ldlq()),
    "nearest": ("mixtral", HALF, 3.25, Nearest()),
    "learned": ("llama", INTEGER, 4.9, Nearest(), LEARN),
    "one batch": ("llama", INTEGER, 4.9, Ldlq(), "none", BATCHES[:1]),
    "measured": ("llama", HALF, 3.25, Ldlq(), "hadamard", BATCHES, None, Evolve(generations=1, offspring=3)),
}


def case(folder: Path, name: str, prefix: str) -> dict[str, Any]:
    model, *how = CASES[name]
    return quantize(folder / model, folder / f"{prefix}-{name}", *how)


def in_memory() -> str:
    """The hash of all that a mixture of experts holds when it was quantized in memory."""
    model = families.build("MixtralForCausalLM", "mixtral", num_hidden_layers=2)
    compress.quantize(model, bits=4.9, codec=INTEGER, data=BATCHES)
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def stopped(folder: Path, prefix: str) -> None:
    """A run that ends when two of three blocks are on disk."""
    committed = CalibratedRounder.committed

    def die(self: CalibratedRounder, index: int) -> None:
        committed(self, index)
        if index == 1:
            raise Killed

    CalibratedRounder.committed = die
    try:
        case(folder, "pyramid", prefix)
    except Killed:
        pass
    finally:
        CalibratedRounder.committed = committed


def failing(folder: Path, world: World, error: Exception) -> list[Any]:
    """What becomes of a run of which the last process fails where each works on its own rows."""
    add = Moments.add

    def spoilt(self: Moments, *rows: Any) -> None:
        if world.rank == world.size - 1:
            raise error
        add(self, *rows)

    Moments.add = spoilt
    out = folder / "failed"
    try:
        quantize(folder / "llama", out, INTEGER, 4.9, Ldlq())
    except (CompressError, ValueError) as found:
        world.gather(None)
        left = sorted(path.name for path in out.with_name("failed.work").iterdir())
        return [type(found).__name__, str(found), out.exists(), left]
    finally:
        Moments.add = add
    return ["none"]


def warnings(folder: Path, world: World) -> list[str]:
    """What the first process hears of warnings of the last one, and of one that all have."""
    heard: list[Event] = []
    with Workspace.open(folder / "warned", {}, events=Events([heard.append])) as work:
        work.events.emit("warning", text="all")
        if world.rank == world.size - 1:
            work.events.emit("warning", text="the last")
        work.commit("unit", [], {})
    return [event.data["text"] for event in heard if event.kind == "warning"]


def other_data(world: World) -> str:
    try:
        compress.quantize(families.llama(), bits=4.9, codec=INTEGER, data=IDS[world.rank :][:20])
    except CompressError as error:
        return str(error)
    return "taken"


def main(folder: Path, prefix: str) -> None:
    found: dict[str, Any] = {}
    with joined() as world:
        for name in CASES:
            found[name] = case(folder, name, prefix).get("processes", 1)
        found["memory"] = in_memory()
        stopped(folder, f"stopped-{prefix}")
        if world.size > 1:
            found["resumed"] = case(folder, "pyramid", "stopped-one").get("processes")
            found["known"] = failing(folder, world, NumericsError("Spoilt.", remedy="Mend it."))
            found["unknown"] = failing(folder, world, ValueError("odd"))
            found["warnings"] = warnings(folder, world)
            found["other data"] = other_data(world)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
