"""The picture of a step: bytes over its moments, and what every region keeps for its backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fxmem import files
from fxmem.optional import require
from fxmem.streaming.keep_levels import NAMES

INK, FAINT = "#22303c", "#d8dee4"
LIVE = "#00798c"
LEVELS = ("#b9c4cd", "#e0a030", "#d1495b", "#7a6fac")
"""Of what is kept, in the order of the levels."""


def draw(report: Any, path: Path) -> None:
    """Write the picture of the latest call of a :class:`~fxmem.report.text.Report`.

    Raises:
        MissingExtraError: matplotlib is not installed.
        FileError: it cannot be written.
    """
    files.check_target(path)
    require("matplotlib").use("Agg")
    plt = require("matplotlib.pyplot")
    style = {"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT}
    with plt.rc_context(style):
        figure, (live, kept) = plt.subplots(2, 1, figsize=(10.5, 6.4), layout="constrained")
        _draw_live(live, report.predicted.timeline)
        _draw_kept(kept, [(k, at) for r in report.regions for k in r.keeps for at in k.positions])
        for axes in (live, kept):
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(color=FAINT)
            axes.grid(axis="y", color=FAINT, lw=0.8)
            axes.set_axisbelow(True)
        sizes = ", ".join(f"{name} = {size:,}" for name, size in report.sizes.items())
        figure.suptitle(
            f"{report.model}, one step, {sizes}", fontsize=12, fontweight="bold", x=0.01, ha="left"
        )
        with files.replacing(path) as part:
            figure.savefig(part, dpi=130)
        plt.close(figure)


def _draw_live(axes: Any, timeline: list[tuple[str, int]]) -> None:
    """The predicted curve, with its peak and the turn from forward to backward."""
    alive = [count / 1e6 for _, count in timeline]
    axes.fill_between(range(len(alive)), alive, step="post", color=LIVE, alpha=0.25, lw=0)
    axes.step(range(len(alive)), alive, where="post", color=LIVE, lw=1.2)
    top = max(range(len(alive)), key=alive.__getitem__)
    axes.plot(top + 0.5, alive[top], "o", color=LIVE, ms=5)
    axes.set_title(f"peak {alive[top]:,.3g} MB: {timeline[top][0]}", fontsize=10, loc="left")
    turn = [i for i, (label, _) in enumerate(timeline) if label == "after forward"]
    for at in turn:
        axes.axvline(at, color=INK, lw=0.8, ls=":")
        axes.annotate(
            "backward", (at, 0), (4, 4), textcoords="offset points", color=INK, fontsize=9
        )
    axes.set(xlim=(0, max(1, len(alive) - 1)), ylim=(0, 1.15 * max(alive)), xticks=[])
    axes.set_ylabel("predicted MB above the parameters")


def _draw_kept(axes: Any, found: list[tuple[Any, int]]) -> None:
    """One bar per region: bytes by colour of the level, pale where they wait off the device."""
    labels: set[str] = set()
    for keep, at in found:
        if not keep.bytes:
            continue
        away = "" if keep.where == "device" else f", on the {keep.where}"
        label = NAMES[keep.level] + away
        axes.bar(
            at, keep.bytes / 1e6, color=LEVELS[keep.level], alpha=0.45 if away else 1.0,
            hatch="///" if away else None, edgecolor="white", lw=0.5,
            label=None if label in labels else label,
        )  # fmt: skip
        labels.add(label)
    seconds = sum(keep.again for keep, _ in found)
    axes.set(xlabel="regions in the order of the forward", ylabel="MB kept for the backward")
    axes.set_title(
        f"made again in the backward: {seconds:.2g} s, by the rates of this device",
        fontsize=10, loc="left",
    )  # fmt: skip
    if labels:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)


__all__ = ["draw"]
