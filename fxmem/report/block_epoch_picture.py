"""The picture of a block-epoch: roles of all blocks above, live bytes below, over its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fxmem import files

INK, FAINT = "#22303c", "#d8dee4"
ROLES = {
    "active": ("active: AdamW", "#d1495b"),
    "update": ("updated inside the backward", "#66b2bd"),
    "low_rank": ("learns its low-rank term", "#7a6fac"),
    "passes": ("hands the gradient on", "#dfe5ea"),
    "idle": ("forward only", "#f7f9fa"),
}
BYTES = (
    ("state_bytes", "optimizer state", "#d1495b"),
    ("gradient_bytes", "gradients in .grad", "#e0a030"),
    ("update_bytes", "largest inactive gradient alive", "#66b2bd"),
    ("saved_bytes", "states saved for the backward", "#b9c4cd"),
)


def draw(epoch: Any, path: Path) -> None:
    """Write the picture of a :class:`~fxmem.report.block_epoch.BlockEpoch`.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    from fxmem.optional import require

    require("matplotlib").use("Agg")
    plt = require("matplotlib.pyplot")
    style = {"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT}
    tall = min(9.0, 1.2 + 0.17 * len(epoch.rows))
    with plt.rc_context(style):
        figure, (roles, live) = plt.subplots(
            2, 1, figsize=(10.5, tall + 3.4), height_ratios=(tall, 2.2), sharex=True,
            layout="constrained",
        )  # fmt: skip
        _draw_roles(roles, epoch)
        _draw_bytes(live, epoch)
        for axes in (roles, live):
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(color=FAINT)
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
            if epoch.visits[0].first < epoch.step <= epoch.visits[-1].last:
                axes.axvline(epoch.step, color=INK, lw=0.8, ls=":")
        figure.suptitle(
            f"Block-epoch {epoch.index}: {len(epoch.visits)} visits, AdamW on everything would "
            f"hold {epoch.all_bytes / 1e6:,.0f} MB of gradients and state",
            fontsize=12, fontweight="bold", x=0.01, ha="left",
        )  # fmt: skip
        with files.replacing(path) as part:
            figure.savefig(part, dpi=130)
        plt.close(figure)


def _draw_roles(axes: Any, epoch: Any) -> None:
    used = {role for visit in epoch.visits for role in visit.roles.values()}
    for role, (label, colour) in ROLES.items():
        if role in used:
            axes.bar([0], [0], color=colour, ec=FAINT, lw=0.6, label=label)
    for visit in epoch.visits:
        width = visit.last + 1 - visit.first
        for role, (_, colour) in ROLES.items():
            rows = [i for i, row in enumerate(epoch.rows) if visit.roles[row] == role]
            if rows:
                axes.bar(
                    [visit.first + width / 2] * len(rows), [0.92] * len(rows), width * 0.97,
                    bottom=[i - 0.46 for i in rows], color=colour, lw=0,
                )  # fmt: skip
    every = max(1, len(epoch.rows) // 16)
    shown = [i for i in range(len(epoch.rows)) if i % every == 0 or i == len(epoch.rows) - 1]
    axes.set_yticks(shown, [epoch.rows[i] for i in shown], fontsize=8)
    axes.set_ylim(-0.6, len(epoch.rows) - 0.4)
    axes.set_ylabel("from the input (below) to the head")
    axes.set_xlim(epoch.visits[0].first, epoch.visits[-1].last + 1)


def _draw_bytes(axes: Any, epoch: Any) -> None:
    at = [v.first + (v.last + 1 - v.first) / 2 for v in epoch.visits]
    widths = [(v.last + 1 - v.first) * 0.97 for v in epoch.visits]
    bottom = [0.0] * len(at)
    for key, label, colour in BYTES:
        values = [(getattr(v, key) or 0) / 1e6 for v in epoch.visits]
        if any(values):
            axes.bar(at, values, widths, bottom=bottom, color=colour, label=label, lw=0)
        bottom = [b + v for b, v in zip(bottom, values, strict=True)]
    axes.set_ylabel("MB")
    axes.set_xlabel("optimizer step")
    axes.grid(axis="y", color=FAINT, lw=0.8)
    axes.set_axisbelow(True)


__all__ = ["draw"]
