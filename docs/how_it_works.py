"""Draws ``how_it_works.png``, the loops of one decoder layer: ``python docs/how_it_works.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, SOFT, LINE, PAPER = "#1f2933", "#66758a", "#cbd5e1", "#ffffff"
BLUE, GREEN, ORANGE, VIOLET = "#2f6fde", "#1a936f", "#e07a1f", "#7a4fd0"
CHUNKS, CELL, LEFT = 8, 0.62, 2.05
"""Chunks in the picture, width of one, and where the first one starts."""

Row = tuple[str, str, str, str]
"""Name, colour, a sign per chunk (# in memory, @ this chunk, - partial sum, . not there), note."""


Panel = tuple[str, str, str, int, list[Row], list[str]]
PANELS: list[Panel] = [
    (
        "1", "Forward", "one ascending loop", 1,
        [
            ("h in", BLUE, "########", "kept"),
            ("K, V", GREEN, "####@...", "buffer"),
            ("q, MLP", ORANGE, "....@...", "one chunk"),
            ("h out", BLUE, "####@...", "kept"),
        ],
        [
            "K, V of the chunk",
            "attention: q of the chunk,",
            "K, V up to the chunk",
            "MLP of the chunk",
        ],
    ),
    (
        "2", "K, V again", "one loop", -1,
        [
            ("h in", BLUE, "########", "kept"),
            ("K, V", GREEN, "...@####", "buffer"),
        ],
        ["norm and projections", "of the chunk"],
    ),
    (
        "3", "Backward", "one descending loop", -1,
        [
            ("h in", BLUE, "########", "kept"),
            ("dh out", BLUE, "########", "given"),
            ("K, V", GREEN, "########", "complete"),
            ("q, MLP, dq", ORANGE, "...@....", "one chunk"),
            ("dK, dV", VIOLET, "---@####", "sums"),
            ("dh in", BLUE, "...@####", "result"),
        ],
        [
            "recompute the chunk,",
            "backward down to dq;",
            "dK, dV of earlier keys add up;",
            "those of the chunk are complete:",
            "through their projections",
            "into dh; dW += dYᵀX",
        ],
    ),
]  # fmt: skip


def draw_row(ax: Axes, y: float, row: Row) -> None:
    """One value along the sequence: a cell per chunk."""
    name, colour, states, stored = row
    ax.text(LEFT - 0.16, y + 0.19, name, ha="right", va="center", fontsize=11, color=INK)
    for i, state in enumerate(states):
        x = LEFT + i * CELL
        face, edge, style, width = PAPER, LINE, "-", 0.9
        if state == "#":
            face, edge = colour + "59", colour + "99"
        elif state == "@":
            face, edge, width = colour, colour, 1.2
        elif state == "-":
            face, edge, style = colour + "1c", colour + "77", (0, (2, 2))
        ax.add_patch(
            FancyBboxPatch(
                (x + 0.035, y), CELL - 0.07, 0.38, boxstyle="round,pad=0,rounding_size=0.06",
                facecolor=face, edgecolor=edge, linestyle=style, linewidth=width,
            )
        )  # fmt: skip
    ax.text(
        LEFT + CHUNKS * CELL + 0.14, y + 0.19, stored, ha="left", va="center",
        fontsize=9.5, color=SOFT, style="italic",
    )  # fmt: skip


def draw_panel(ax: Axes, top: float, panel: Panel) -> float:
    """One loop; returns the height used."""
    number, title, kind, direction, rows, steps = panel
    height = 1.22 + 0.52 * len(rows)
    ax.add_patch(
        FancyBboxPatch(
            (0.1, top - height), 11.3, height - 0.12, boxstyle="round,pad=0,rounding_size=0.16",
            facecolor="#f8fafc", edgecolor="#e2e8f0", linewidth=1.0,
        )
    )  # fmt: skip
    ax.text(0.42, top - 0.5, number, fontsize=17, color=BLUE, weight="bold", va="center")
    ax.text(0.85, top - 0.5, title, fontsize=13.5, color=INK, weight="bold", va="center")
    ax.text(
        LEFT + CHUNKS * CELL, top - 0.5, kind, fontsize=10.5, color=SOFT, va="center", ha="right"
    )
    bottom = top - 0.98 - 0.52 * (len(rows) - 1) - 0.2
    for i, row in enumerate(rows):
        draw_row(ax, top - 1.14 - 0.52 * i, row)
    ends = (LEFT + 0.1, LEFT + CHUNKS * CELL - 0.1)
    ax.add_patch(
        FancyArrowPatch(
            (ends[0] if direction > 0 else ends[1], bottom - 0.17),
            (ends[1] if direction > 0 else ends[0], bottom - 0.17),
            arrowstyle="-|>", mutation_scale=13, color=SOFT, linewidth=1.2,
        )
    )  # fmt: skip
    middle = top - 0.5 * height - 0.06
    for i, step in enumerate(steps):
        y = middle + (0.5 * (len(steps) - 1) - i) * 0.3
        ax.text(8.35, y, step, fontsize=10.5, color=INK, va="center")
    return height


def legend(ax: Axes, y: float) -> None:
    """What the cells mean."""
    shown = [("@", "this chunk"), ("#", "in memory"), ("-", "partial sum"), (".", "not there")]
    for i, (state, text) in enumerate(shown):
        x = 0.42 + 2.35 * i
        face = {"@": SOFT, "#": SOFT + "59", "-": SOFT + "1c", ".": PAPER}[state]
        ax.add_patch(
            FancyBboxPatch(
                (x, y - 0.12), 0.42, 0.26, boxstyle="round,pad=0,rounding_size=0.05",
                facecolor=face, edgecolor=LINE if state == "." else SOFT + "99",
                linestyle=(0, (2, 2)) if state == "-" else "-", linewidth=0.9,
            )
        )  # fmt: skip
        ax.text(x + 0.55, y, text, fontsize=10, color=SOFT, va="center")


def main() -> None:
    total = 1.15 + sum(1.22 + 0.52 * len(panel[4]) for panel in PANELS)
    figure, ax = plt.subplots(figsize=(11.5 * 0.82, (total + 0.6) * 0.82))
    ax.set(xlim=(0, 11.5), ylim=(-0.6, total))
    ax.set_aspect("equal")
    ax.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    ax.text(0.42, total - 0.42, "A decoder layer, streamed", fontsize=17, color=INK, weight="bold")
    ax.text(
        0.42, total - 0.85, "The sequence is cut into chunks; three loops, found by the compiler, "
        "give autograd's gradients.", fontsize=11, color=SOFT,
    )  # fmt: skip
    top = total - 1.1
    for panel in PANELS:
        top -= draw_panel(ax, top, panel)
    legend(ax, -0.27)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=150, facecolor=PAPER)


if __name__ == "__main__":
    main()
