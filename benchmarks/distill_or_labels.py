"""Is distilling worth it? The same student, rows, order and steps: from a teacher, and from labels alone.

    python benchmarks/distill_or_labels.py [--steps 300] [--seeds 0 1 2] [--quick] [--json]

Both runs of a pair start from the same weights and differ in nothing but the loss: forward KL to `builtin:teacher`
against cross entropy on the labels. The figure is the validation loss (nats per token on labels, `builtin:python/val`),
so the comparison is on the ground of the run that trains on labels.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from compress.distillation.run import distill_stage
from compress.evaluation.evaluate import evaluate
from compress.recipe import make_recipe
from compress.workspace import Workspace


def train(folder: Path, loss: str, start: str, steps: int, seed: int) -> Path:
    """Train for `steps` and return the folder of the student."""
    out = folder / f"{loss}-{seed}"
    scratch = start == "scratch"
    recipe = make_recipe(
        {
            "out": str(out),
            "seed": seed,
            **({} if scratch else {"model": start}),
            "distill": {
                "teacher": "builtin:teacher" if loss == "kl" else None,
                "data": "builtin:python/train",
                "losses": [loss],
                "steps": steps,
                "batch_size": 8,
                "context": 256,
                "learning_rate": 3e-3 if scratch else 1e-3,
                "optimizer": "muon",
                "warmup_steps": steps // 20,
                "precision": "bf16",
                **(
                    {"student": {"config": "recipes/models/student.json", "tokenizer": "builtin:teacher"}}
                    if scratch
                    else {}
                ),
            },
        }
    )
    assert recipe.distill is not None
    with Workspace.open(folder / f"{out.name}.work", recipe.arguments()) as workspace:
        distill_stage(recipe.distill, recipe.model, out, workspace, seed=seed)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--start", default="builtin:student", help="a model, or 'scratch' for random weights")
    parser.add_argument("--limit", type=int, default=65536, help="validation tokens")
    parser.add_argument("--quick", action="store_true", help="60 steps, one seed")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    steps, seeds = (60, [0]) if options.quick else (options.steps, options.seeds)
    wins = 0
    for seed in seeds:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            found = {
                loss: evaluate(
                    str(train(folder, loss, options.start, steps, seed)),
                    data="builtin:python/val",
                    reference="builtin:teacher",
                    limit=options.limit,
                )
                for loss in ("kl", "cross_entropy")
            }
        row = {"seed": seed, "steps": steps, "start": options.start}
        for loss, figures in found.items():
            row |= {f"{loss}_nll": figures["nll"], f"{loss}_kl_to_teacher": figures["kl_divergence"]}
        row["nll_ratio"] = found["kl"]["nll"] / found["cross_entropy"]["nll"]
        wins += row["nll_ratio"] < 1
        print(
            json.dumps(row)
            if options.json
            else "  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        )
    print(f"distilled is lower in {wins} of {len(seeds)}")
    if wins < len(seeds):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
