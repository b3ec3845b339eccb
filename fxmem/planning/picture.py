"""A forecast's picture: bytes over the chosen step, stacked by part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fxmem.errors import PlanError
from fxmem.files import check_target, replacing
from fxmem.optional import require
from fxmem.planning.answer import PARTS, Answer, size
from fxmem.planning.text import title

COLOURS = ("#5b6c7d", "#9aa7b4", "#e0a030", "#00798c", "#d1495b")
"""Of the parts, in their order."""
INK, FAINT = "#22303c", "#d8dee4"


def write_picture(forecast: Answer, path: Path) -> None:
    """As PNG or SVG, by the name's ending.

    Raises:
        PlanError: another ending.
        FileError: it cannot be written.
    """
    if path.suffix.lower() not in (".png", ".svg"):
        raise PlanError(f"the picture is {str(path)!r}", advice="give a name in .png or .svg")
    check_target(path)
    with replacing(path) as part:
        draw(forecast, part, path.suffix.lower().removeprefix("."))


def draw(forecast: Answer, into: Any, kind: str) -> None:
    """Write the picture into a file, as ``"png"`` or ``"svg"``."""
    require("matplotlib").use("Agg")
    plt = require("matplotlib.pyplot")
    assert forecast.steps is not None
    bytes_ = forecast.steps.bytes
    count = len(bytes_)
    fixed = [np.full(count, forecast.parts[name]) for name in PARTS[:2]]
    stacked = np.vstack([*fixed, *bytes_.T]) / 1e9
    style = {
        "font.size": 11, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT,
        "svg.hashsalt": "fxmem", "svg.fonttype": "none",
    }  # fmt: skip
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(10, 4.6), layout="constrained")
        labels = [f"{name}, {size(forecast.parts[name])} at the peak" for name in PARTS]
        axes.stackplot(
            range(count), stacked, labels=labels, colors=COLOURS, step="post", lw=0, alpha=0.9
        )
        axes.axhline(forecast.memory / 1e9, color=INK, lw=1.2, ls="--")
        axes.annotate(
            f"memory {size(forecast.memory)}", (0, forecast.memory / 1e9), (4, 4),
            textcoords="offset points",
        )  # fmt: skip
        axes.set_xlim(0, max(1, count - 1))
        axes.set_ylim(0, 1.12 * max(forecast.memory / 1e9, stacked.sum(0).max(initial=0)))
        axes.set_xlabel("moments of the step: forward, then backward")
        axes.set_xticks([])
        axes.set_ylabel("GB")
        axes.grid(axis="y", color=FAINT, lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        handles, names = axes.get_legend_handles_labels()
        figure.legend(
            handles[::-1], names[::-1], loc="outside right upper", frameon=False, fontsize=10
        )
        what = f"{forecast.chosen.method}, {forecast.chosen.optimizer}"
        axes.set_title(
            f"{title(forecast)}\n{forecast.length:,} tokens, {what}", loc="left", fontsize=11
        )
        figure.savefig(into, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {})
        plt.close(figure)
