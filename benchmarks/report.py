"""Records into medians, a markdown table and pictures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.setups import SETUPS
from fxmem.measure.subprocess_job import OK
from fxmem.optional import require

MIB = 2**20
INK, FAINT = "#22303c", "#d8dee4"
COLOURS = ("#d1495b", "#e0a030", "#b5803a", "#8a6d3b", "#7a6fac", "#00798c", "#888888", "#4c6272")
REFERENCE = "checkpoint"
MEASURES = (
    ("peak", MIB, "peak, MiB above the parameters"),
    ("median_seconds", 1e-3, "ms per step"),
)
COLUMNS = (
    "setup",
    "peak MiB",
    "process MiB",
    "ms",
    "best ms",
    "time",
    "view",
    "first s",
    "loss",
    "gradients",
)

Record = dict[str, Any]


def summarise(records: Sequence[Record]) -> list[Record]:
    """One row per length, objective and setup: medians over repeats, first reason of a failure."""
    groups: dict[tuple[int, str, str], list[Record]] = {}
    for record in records:
        key = (record["length"], record["objective"], record["setup"])
        groups.setdefault(key, []).append(record)
    worked = {_case(r): r for r in records if r["status"] == OK}
    base = reference(records)
    return [_row(members, worked, base) for _, members in sorted(groups.items(), key=_in_order)]


def reference(records: Sequence[Record]) -> str:
    """The setup that times are relative to: checkpointing, or the first where that did not run."""
    setups = [record["setup"] for record in records]
    return REFERENCE if REFERENCE in setups else setups[0]


def _case(record: Record, setup: str | None = None, ids: str | None = None) -> tuple[Any, ...]:
    setup, ids = setup or record["setup"], ids or record.get("ids", "fresh")
    return record["repeat"], record["length"], record["objective"], setup, ids


def _in_order(item: tuple[tuple[int, str, str], Any]) -> tuple[int, int, int]:
    length, objective, setup = item[0]
    return length, ("sft", "dpo", "grpo").index(objective), list(SETUPS).index(setup)


def _ratio(record: Record, base: Record) -> float:
    """Median over the steps, each divided by the other setup's step of the same number."""
    pairs = zip(timed(record), timed(base), strict=True)
    return statistics.median(own / other for own, other in pairs)


def timed(record: Record) -> list[float]:
    """Seconds of the steps after the first, which compiles."""
    seconds: list[float] = record["seconds"]
    return seconds[1:] or seconds


def _row(members: list[Record], done: dict[tuple[Any, ...], Record], base: str) -> Record:
    row = {key: members[0][key] for key in ("length", "objective", "setup")}
    worked = [record for record in members if record["status"] == OK]
    if not worked:
        return {**row, "status": members[0]["status"], "reason": members[0]["reason"]}
    for key in ("peak", "process_peak", "median_seconds", "first_seconds"):
        row[key] = statistics.median(record[key] for record in worked)
    row["best_seconds"] = min(min(timed(r)) for r in worked)
    pairs = [(r, done.get(_case(r, base))) for r in worked]
    ratios = [_ratio(record, other) for record, other in pairs if other is not None]
    row["ratio"] = statistics.median(ratios) if ratios else None
    views = [(r, done.get(_case(r, ids="fresh"))) for r in worked if r.get("ids") == "view"]
    of_views = [_ratio(record, other) for record, other in views if other is not None]
    row["view"] = statistics.median(of_views) if of_views else None
    row["loss"] = worked[0]["losses"][0]
    row["difference"] = next((r["difference"] for r in worked if "difference" in r), None)
    return {**row, "status": OK, "repeats": len(worked)}


def markdown(rows: Iterable[Record], title: str, base: str = REFERENCE) -> str:
    """The table, one per objective and length; times are relative to the setup ``base``."""
    lines = [
        f"# {title}",
        "",
        "Medians over repeats, one process per figure. Peak: live tensors above the parameters,",
        "gradients included. Process: resident peak while training. ms: one forward and backward,",
        "median over repeats of each process's median; best: the fastest of all, which other load",
        f"on the machine disturbs least. Time: relative to {SETUPS[base].label}, step by step in",
        "each repeat, median. View: ids that are a slice of a longer text relative to ids in a",
        "tensor of their own, step by step, where both ran in a repeat. First: the first step,",
        "compilation included. Gradients: largest max|difference| / max|reference| over all",
        "parameters, against plain autograd.",
    ]
    heading: tuple[Any, ...] = ()
    for row in rows:
        if heading != (row["length"], row["objective"]):
            heading = (row["length"], row["objective"])
            lines += ["", f"## {row['objective'].upper()}, {row['length']} tokens", ""]
            lines += [
                "| " + " | ".join(COLUMNS) + " |",
                "|---" + "|---:" * (len(COLUMNS) - 1) + "|",
            ]
        lines.append("| " + " | ".join(_cells(row)) + " |")
    return "\n".join(lines) + "\n"


def _cells(row: Record) -> list[str]:
    label = SETUPS[row["setup"]].label
    label = f"**{label}**" if SETUPS[row["setup"]].fxmem else label
    if row["status"] != OK:
        reason = row["reason"].replace("|", "/")
        return [label, reason if reason.startswith(row["status"]) else f"{row['status']}: {reason}"]
    return [
        label,
        f"{row['peak'] / MIB:.0f}",
        f"{row['process_peak'] / MIB:.0f}",
        f"{1000 * row['median_seconds']:.0f}",
        f"{1000 * row['best_seconds']:.0f}",
        "" if row["ratio"] is None else f"{row['ratio']:.2f}",
        "" if row["view"] is None else f"{row['view']:.2f}",
        f"{row['first_seconds']:.1f}",
        f"{row['loss']:.6g}",
        "" if row["difference"] is None else f"{row['difference']:.1e}",
    ]


def write(records: Sequence[Record], out: Path, stem: str, title: str) -> list[Path]:
    """Markdown and pictures into ``out``; returns the files."""
    rows = summarise(records)
    out.mkdir(parents=True, exist_ok=True)
    table = out / f"{stem}.md"
    table.write_text(markdown(rows, title, reference(records)))
    worked = [row for row in rows if row["status"] == OK]
    if not worked:
        return [table]
    longest = max(row["length"] for row in worked)
    bars = out / f"{stem}.png"
    shown = [row for row in rows if row["length"] == longest]
    _draw_bars(shown, bars, f"{title}, {longest} tokens")
    if len({row["length"] for row in worked}) == 1:
        return [table, bars]
    lines = out / f"{stem}-lengths.png"
    _draw_lengths(worked, lines, title)
    return [table, bars, lines]


def _colour(setup: str) -> str:
    return COLOURS[list(SETUPS).index(setup) % len(COLOURS)]


def _panels(rows: Sequence[Record], lines: int, height: float) -> tuple[Any, Any, list[str]]:
    """Figure, axes [lines, objectives] and the objectives."""
    require("matplotlib").use("Agg")
    plt = require("matplotlib.pyplot")
    objectives = list(dict.fromkeys(row["objective"] for row in rows))
    figure, axes = plt.subplots(
        lines,
        len(objectives),
        figsize=(2.2 + 3.6 * len(objectives), height),
        squeeze=False,
        sharey="row",
        layout="constrained",
    )
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(color=FAINT)
        panel.set_axisbelow(True)
    return figure, axes, objectives


def _finish(figure: Any, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left", color=INK)
    figure.savefig(path, dpi=150)
    require("matplotlib.pyplot").close(figure)


def _draw_bars(rows: Sequence[Record], path: Path, title: str) -> None:
    setups = list(dict.fromkeys(row["setup"] for row in rows))
    figure, axes, objectives = _panels(rows, len(MEASURES), 1.6 + 0.62 * len(setups))
    for line, (key, scale, label) in zip(axes, MEASURES, strict=True):
        for panel, objective in zip(line, objectives, strict=True):
            found = {row["setup"]: row for row in rows if row["objective"] == objective}
            sizes = [found.get(setup, {}).get(key, 0.0) / scale for setup in setups]
            bars = panel.barh(range(len(setups)), sizes, color=[_colour(s) for s in setups])
            texts = [_bar_text(found.get(setup, {}), key, scale) for setup in setups]
            panel.bar_label(bars, texts, padding=3, fontsize=9)
            panel.set_yticks(range(len(setups)), [SETUPS[setup].label for setup in setups])
            panel.set_xlim(right=1.18 * (max(sizes) or 1.0))
            panel.set_xlabel(label)
            panel.grid(axis="x", color=FAINT, lw=0.8)
        line[0].invert_yaxis()
    for panel, objective in zip(axes[0], objectives, strict=True):
        panel.set_title(objective.upper(), fontsize=11)
    _finish(figure, path, title)


def _bar_text(row: Record, key: str, scale: float) -> str:
    return f"{row[key] / scale:.0f}" if key in row else row.get("status", "not run")


def _draw_lengths(rows: Sequence[Record], path: Path, title: str) -> None:
    figure, axes, objectives = _panels(rows, 1, 4.6)
    for panel, objective in zip(axes[0], objectives, strict=True):
        for setup in dict.fromkeys(row["setup"] for row in rows):
            chosen = [r for r in rows if (r["objective"], r["setup"]) == (objective, setup)]
            lengths = [row["length"] for row in chosen]
            peaks = [row["peak"] / MIB for row in chosen]
            style = {"color": _colour(setup), "marker": "o", "ms": 4}
            panel.plot(lengths, peaks, label=SETUPS[setup].label, **style)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.yaxis.set_major_formatter("{x:.0f}")
        panel.set_title(objective.upper(), fontsize=11)
        panel.set_xlabel("tokens")
        panel.grid(color=FAINT, lw=0.8)
    axes[0][0].set_ylabel("peak, MiB above the parameters")
    axes[0][-1].legend(frameon=False, fontsize=8)
    _finish(figure, path, title)
