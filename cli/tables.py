"""Figures as text: plans, reports, matrices. Everything here takes plain data and returns a string."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.plan import Plan, QuantizationPlan
    from compress.plan.sweep import Sweep

Row = Sequence[Any]


def table(head: Sequence[str], rows: Iterable[Row]) -> str:
    """Columns as wide as their widest cell; the first is set left, numbers are set right."""
    lines = [list(head), *([cell(value) for value in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def cell(value: Any) -> str:
    """A value as a person reads it: five significant digits, digits in threes, `-` for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, (list, tuple)) and all(isinstance(entry, int) for entry in value):
        return " x ".join(str(entry) for entry in value)
    return str(value)


def entry_text(entry: str | Mapping[str, Any]) -> str:
    """An entry of a list: its name alone, or a method as it is written on the command line, with what it is below."""
    if isinstance(entry, str):
        return entry
    options = ",".join(f"{name}={option_text(value)}" for name, value in entry["options"].items())
    needs = f"  (reads: {', '.join(entry['needs'])})" if entry.get("needs") else ""
    if "bits_per_weight" in entry:
        low, high = entry["bits_per_weight"]
        carried = ", ".join(
            f"{name} (to {most:g} bits)" if most < high else name for name, (_, most) in entry["containers"].items()
        )
        carried = carried or "no stock container with these options"
        rates = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        needs = f"  ({rates} bits a weight before scales; exact in: {carried})"
    head = f"{entry['name']}{':' if options else ''}{options}"
    return "\n".join([head, *textwrap.wrap(entry["is"] + needs, 112, initial_indent="    ", subsequent_indent="    ")])


def option_text(value: Any) -> str:
    """A value as it is written in NAME:key=value."""
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def size(count: int) -> str:
    """Bytes with a decimal unit: `812 B`, `4.1 MB`."""
    amount, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while amount >= 1000 and len(units) > 1:
        amount /= 1000
        units.pop(0)
    return f"{count} B" if units[0] == "B" else f"{amount:.1f} {units[0]}"


def plan_text(plan: Plan) -> str:
    """A plan, matrix by matrix, stage by stage, and what comes of it."""
    parts = []
    if plan.quantization is not None:
        parts.append(_matrices(plan.quantization))
    for number, stage in enumerate(plan.stages, 1):
        lines = [f"{number}. {stage.name}: {stage.text}"]
        if stage.out is not None:
            lines.append(f"   result: {stage.out}")
        if stage.memory_bytes is not None:
            lines.append(f"   memory: about {size(stage.memory_bytes)}, estimated; the program itself comes on top")
        parts.append("\n".join([*lines, *(f"   note: {note}" for note in stage.notes)]))
    parts.append(_sizes(plan))
    return "\n\n".join(parts)


def sweep_text(sweep: Sweep) -> str:
    """The rates of a sweep, one a line."""
    head = ("bits", "bits/weight", "bytes", f"predicted {sweep.label}", "uniform", "measured")
    rows = [
        (
            f"{rate.bits:g}",
            rate.bits_per_weight,
            rate.model_bytes,
            rate.predicted,
            rate.predicted_uniform,
            rate.measured,
        )
        for rate in sweep.rates
    ]
    text = table(head, rows)
    if sweep.rank_correlation is not None:
        text += f"\n\nrank correlation of predicted and measured over {sweep.runs} runs: {sweep.rank_correlation:.3f}"
    return text


def _matrices(plan: QuantizationPlan) -> str:
    rows = [
        (matrix.name, matrix.shape, matrix.group.rpartition(".")[2], matrix.codec, matrix.width, matrix.bits_per_weight,
         matrix.bytes)
        for matrix in (*plan.matrices, *plan.tables)
    ]  # fmt: skip
    return table(("matrix", "shape", "group", "codec", "width", "bits/weight", "bytes"), rows)


def _sizes(plan: Plan) -> str:
    lines = [f"parameters            {plan.parameters:,}", f"original bytes        {plan.original_bytes:,}"]
    if plan.quantization is not None:
        figures = plan.quantization
        lines += [
            f"bytes                 {figures.model_bytes:,}",
            f"bits_per_weight       {figures.bits_per_weight:.4f} ({_asked(figures.bits_target)})",
            f"model_bits_per_weight {figures.model_bits_per_weight:.4f}",
        ]
    for data in plan.data:
        digest = f", sha256 {str(data['sha256'])[:16]}" if "sha256" in data else ""
        lines.append(f"data                  {data['spec']} ({data['origin']}{digest})")
    return "\n".join([*lines, f"backend               {plan.backend}", f"work folder           {plan.work}"])


def _asked(bits: float | None) -> str:
    return "the codec's only rate" if bits is None else f"asked: {bits:g}"


def report_text(report: Mapping[str, Any]) -> str:
    """The figures of each stage of a run; those of the evaluation as a table with a column for each model."""
    parts = []
    for stage in report["stages"]:
        if stage == "evaluate":
            parts.append(models_text(report[stage]["models"]))
        else:
            figures = report if stage == "quantize" else report[stage]
            spent = {f"allocation_{name}": value for name, value in figures.get("allocation", {}).items()}
            parts.append(f"{stage}\n{figures_text({**figures, **spent})}")
    return "\n\n".join(parts)


def figures_text(figures: Mapping[str, Any]) -> str:
    """One line for each figure that is a number, a word, or nothing."""
    plain = {name: value for name, value in figures.items() if not isinstance(value, (dict, list))}
    width = max((len(name) for name in plain), default=0)
    return "\n".join(f"  {name.ljust(width)}  {cell(value)}" for name, value in plain.items())


def models_text(models: Mapping[str, Mapping[str, Any]]) -> str:
    """One column for each model, one row for each figure that any of them has; then the texts they wrote."""
    names = dict.fromkeys(
        name for figures in models.values() for name, value in figures.items() if not isinstance(value, (dict, list))
    )
    text = table(("", *models), [(name, *(figures.get(name) for figures in models.values())) for name in names])
    samples = [
        f"{model}, sample {number}:\n{sample['prompt']}>>>{sample['text']}"
        for model, figures in models.items()
        for number, sample in enumerate(figures.get("samples", ()), 1)
    ]
    return "\n\n".join([text, *samples])
