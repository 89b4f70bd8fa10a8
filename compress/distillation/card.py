"""The model card of a trained student: how, from what, on what, how long."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from compress.hardware import describe_machine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress.recipe import DistillRecipe


def write_card(path: Path, model: PreTrainedModel, recipe: DistillRecipe, record: dict[str, Any]) -> None:
    """Write the card; `record` is what the distillation stage returns."""
    machine = describe_machine()
    data = record["data"]
    title = "Distilled student" if recipe.teacher else "Language model trained on labels"
    text_of = f"{data['documents']:,} documents, {data['bytes']:,} bytes, sha256 {data['sha256'][:16]}"
    losses = [f"{loss:.4f} at step {step}" for step, loss in record["loss"]] or ["not logged"]
    of_processes = f"{record['processes']} processes of " if record["processes"] > 1 else ""
    text = f"""# {title}

{type(model).__name__}, {record["parameters"]:,} parameters. An ordinary checkpoint, which
`AutoModelForCausalLM.from_pretrained` loads.

| | |
|---|---|
| teacher | {recipe.teacher or "none (labels alone)"} |
| started from | {record["student"] or "random weights"} |
| data | {data["spec"]} ({data["origin"]}; {text_of}) |
| training | {record["steps"]:,} steps, {record["tokens"]:,} tokens |
| training loss | {", ".join(dict.fromkeys([losses[0], losses[-1]]))} |
| time | {record["seconds"]:.0f} s on {machine["cpu"]}, {of_processes}{record["threads"]} threads |
| versions | Python {machine["python"]}, torch {machine["torch"]}, transformers {machine["transformers"]} |

## Recipe

```yaml
{yaml.safe_dump({"distill": recipe.model_dump(mode="json", exclude_none=True)}, sort_keys=False).strip()}
```
"""
    path.write_text(text, encoding="utf-8")
