"""Bits a weight against KL divergence, a panel for each model."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from peers.table import Row

from compress.errors import DependencyError

EXTRA = "bench"


def require_matplotlib() -> None:
    """Raise `DependencyError` unless matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise DependencyError("matplotlib", EXTRA)


def draw(rows: Sequence[Row], path: Path) -> None:
    """One mark a row, with its standard error; the divergence on a logarithmic axis. Raises `DependencyError` without
    matplotlib."""
    require_matplotlib()
    from matplotlib.figure import Figure  # type: ignore[import-not-found]

    models = list(dict.fromkeys(row["model"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = Figure(figsize=(7 * len(models), 5), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for panel, model in zip(panels, models, strict=True):
        for place, method in enumerate(methods):
            points = sorted(
                (row["bits_per_weight"], row["kl"], row["kl_stderr"])
                for row in rows
                if (row["model"], row["method"]) == (model, method)
            )
            if not points:
                continue
            bits, kl, error = zip(*points, strict=True)
            own = method.startswith("ours")
            panel.errorbar(
                bits,
                kl,
                yerr=error,
                label=method,
                marker="*" if own else "o^sDvPX"[place % 7],
                markersize=11 if own else 6,
                linestyle="-" if own else ":",
                color=f"C{place % 10}",
                linewidth=1,
            )
        panel.set_yscale("log")
        panel.set(title=model, xlabel="true bits per weight", ylabel="KL(original || quantized), nats per token")
        panel.grid(alpha=0.3, which="both")
    shown = {name: mark for panel in panels for mark, name in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown.keys(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=120)
