"""Records of ``benchmarks.blocks`` into a line of progress, a markdown page and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.blocks_setups import SETUPS
from fxmem.measure.subprocess_job import OK
from fxmem.optional import require

MIB = 2**20
INK, FAINT = "#22303c", "#d8dee4"
COLOURS = dict(
    zip(
        SETUPS,
        ("#9aa5ae", "#5b6770", "#b5803a", "#e0a030", "#00798c", "#d1495b", "#66b2bd", "#7a6fac"),
        strict=True,
    )
)
REFERENCE = "adamw+checkpoint"
BASE = "fxmem-badam"

Record = dict[str, Any]


def line(record: Record) -> str:
    """One line of progress."""
    name = f"{record['part']:<9}{SETUPS[record['setup']].label:<42}"
    if record["status"] != OK:
        return f"{name} {record['reason'][:120]}"
    if record["part"] == "time":
        return f"{name} repeat {record['repeat'] + 1}: {record['mean_seconds']:.3f} s per step"
    if record["part"] == "memory":
        live, state = record["live_gradients"] / MIB, record["state_bytes"] / MIB
        return f"{name} peak {record['peak'] / MIB:.1f} MiB, live {live:.1f}, state {state:.1f}"
    start = record["curve"][0][1]
    return f"{name} seed {record['seed']}: {start:.4f} -> {record['final']:.4f}"


def summarise(records: Sequence[Record]) -> list[Record]:
    """One row per setup: medians over repeats, means over seeds, reasons of failures."""
    rows = []
    for name in SETUPS:
        own = [r for r in records if r["setup"] == name]
        if own:
            rows.append({"setup": name, **_time(own, records), **_memory(own), **_learning(own)})
            bad = [r for r in own if r["status"] != OK]
            if bad:
                rows[-1]["reason"] = f"{bad[0]['status']}: {bad[0]['reason']}".replace("|", "/")
    return rows


def _part(records: Sequence[Record], part: str) -> list[Record]:
    return [r for r in records if r["part"] == part and r["status"] == OK]


def _time(own: Sequence[Record], every: Sequence[Record]) -> Record:
    mine = _part(own, "time")
    if not mine:
        return {}
    row: Record = {"seconds": statistics.median(r["mean_seconds"] for r in mine)}
    row["times"] = len(mine)
    for key, setup in (("to_adamw", REFERENCE), ("to_badam", BASE)):
        base = {_at(r): r["mean_seconds"] for r in _part(every, "time") if r["setup"] == setup}
        ratios = [r["mean_seconds"] / base[_at(r)] for r in mine if _at(r) in base]
        row[key] = statistics.median(ratios) if ratios else None
    return row


def _at(record: Record) -> tuple[str, int]:
    return record["run"], record["repeat"]


def _memory(own: Sequence[Record]) -> Record:
    mine = _part(own, "memory")
    keys = ("peak", "state_bytes", "live_gradients", "allowed")
    return {key: mine[0][key] for key in keys} if mine else {}


def _learning(own: Sequence[Record]) -> Record:
    mine = _part(own, "learning")
    if not mine:
        return {}
    finals = [r["final"] for r in mine]
    return {
        "finals": finals, "final": statistics.mean(finals), "rates": mine[0]["rates"],
        "start": mine[0]["curve"][0][1], "steps": mine[0]["curve"][-1][0],
    }  # fmt: skip


COLUMNS = (
    ("peak MiB", lambda r: _mib(r, "peak")),
    ("gradients + state, MiB", lambda r: _mib(r, "live_gradients")),
    ("allowed", lambda r: _mib(r, "allowed")),
    ("state MiB", lambda r: _mib(r, "state_bytes")),
    ("s per step", lambda r: _number(r, "seconds", "{:.2f}")),
    ("to AdamW ckpt", lambda r: _number(r, "to_adamw", "{:.2f}")),
    ("to BAdam", lambda r: _number(r, "to_badam", "{:.2f}")),
    ("held-out loss", lambda r: _number(r, "final", "{:.4f}")),
    ("per seed", lambda r: ", ".join(f"{v:.4f}" for v in r.get("finals", ()))),
)


def _mib(row: Record, key: str) -> str:
    return f"{row[key] / MIB:.1f}" if row.get(key) is not None else ""


def _number(row: Record, key: str, form: str) -> str:
    return form.format(row[key]) if row.get(key) is not None else ""


def markdown(data: Record) -> str:
    """The page: what was run, and one row per setup."""
    rows = summarise(data["records"])
    text = [
        f"# Block training, {data['options'][min(data['options'])]['model']}, float32",
        "",
        "Peak: live tensors above the parameters in a step while the first block is active,",
        "optimizer state included. Gradients + state: most bytes alive at once of tensors with the",
        "shape of a parameter, temporaries of updates included; allowed: gradient and two moments",
        "of the active block plus the largest inactive gradient. s per step: mean over a pass of",
        "all blocks, median over repeats; ratios are taken within one repeat of one run, to AdamW",
        "with checkpointing and to fxmem with frozen inactive blocks. Loss: mean over seeds at the",
        "end.",
        "",
    ]
    for part, options in data["options"].items():
        text.append(f"- {part}: {_conditions(part, options)}")
    starts = {f"{r['start']:.4f}" for r in rows if "start" in r}
    if starts:
        text.append(f"- held-out loss before training: {', '.join(sorted(starts))}")
    for row in rows:
        if rates := row.get("rates"):
            sizes = ", ".join(f"{name} {rates[name]:g}" for name in SETUPS[row["setup"]].rates)
            text.append(f"- step sizes of {SETUPS[row['setup']].label}: {sizes}")
    text += ["", "| setup | " + " | ".join(name for name, _ in COLUMNS) + " |"]
    text.append("|---" + "|---:" * len(COLUMNS) + "|")
    for row in rows:
        cells = [cell(row) for _, cell in COLUMNS]
        text.append(f"| {SETUPS[row['setup']].label} | " + " | ".join(cells) + " |")
    text += [""] + [f"- {SETUPS[r['setup']].label}: {r['reason']}" for r in rows if "reason" in r]
    return "\n".join(text).rstrip() + "\n"


def _conditions(part: str, o: Record) -> str:
    layers = f"{o['layers_per_block']} layer(s) per block"
    if part != "learning":
        text = f"{o['length']} tokens, {layers}, {o['threads']} threads"
        return text
    return (
        f"{o['learn_steps']} steps of {o['batch']} x {o['window']} tokens of "
        f"{o['data'] or 'pydoc_data.topics'}, {layers}, {o['visit']} steps per visit, "
        f"{len(o['seeds'])} seed(s), {o['held_out']} held-out windows"
    )


def write(data: Record, path: Path) -> list[Path]:
    """Page and picture beside the result file; returns all three."""
    page, picture = path.with_suffix(".md"), path.with_suffix(".png")
    page.write_text(markdown(data))
    draw(data, picture)
    return [path, page, picture]


BARS = (
    ("peak", MIB, "peak, MiB above the parameters", "{:,.0f}"),
    ("live_gradients", MIB, "gradients + optimizer state, MiB", "{:,.0f}"),
    ("seconds", 1.0, "seconds per step", "{:.2f}"),
)
"""Key of a row, its unit, the label of its panel and the form of its numbers."""


def draw(data: Record, path: Path) -> None:
    """Bars of memory and time, and the learning curves."""
    require("matplotlib").use("Agg")
    plt = require("matplotlib.pyplot")
    rows = summarise(data["records"])
    style = {"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT}
    with plt.rc_context(style):
        bars = [b for b in BARS if any(row.get(b[0]) for row in rows)]
        curves = _part(data["records"], "learning")
        widths = [1.0] * len(bars) + [1.5] * bool(curves) or [1.0]
        figure, (panels,) = plt.subplots(
            1, len(widths), figsize=(2.5 + 3.2 * sum(widths), 1.6 + 0.5 * max(6, len(rows))),
            layout="constrained", width_ratios=widths, squeeze=False,
        )  # fmt: skip
        for i, (panel, (key, scale, label, form)) in enumerate(zip(panels, bars, strict=False)):
            _bars(panel, rows, key, scale, form)
            panel.set_xlabel(label)
            panel.set_yticks(range(len(rows)), [SETUPS[r["setup"]].label for r in rows])
            if i:
                panel.set_yticklabels([])
        if curves:
            _curves(panels[-1], curves)
        for panel in panels:
            panel.spines[["top", "right"]].set_visible(False)
            panel.tick_params(color=FAINT)
            panel.set_axisbelow(True)
        model = data["options"][min(data["options"])]["model"]
        figure.suptitle(
            f"Block training, {model}, float32", fontsize=13, fontweight="bold", x=0.01, ha="left"
        )
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _bars(panel: Any, rows: Sequence[Record], key: str, scale: float, form: str) -> None:
    values = [(row.get(key) or 0.0) / scale for row in rows]
    drawn = panel.barh(range(len(rows)), values, color=[COLOURS[r["setup"]] for r in rows])
    texts = [form.format(v) if v else "not run" for v in values]
    panel.bar_label(drawn, texts, padding=3, fontsize=9)
    panel.set_xlim(right=1.22 * (max(values, default=0.0) or 1.0))
    panel.grid(axis="x", color=FAINT, lw=0.8)
    panel.invert_yaxis()


def _curves(panel: Any, records: Sequence[Record]) -> None:
    for name in dict.fromkeys(r["setup"] for r in records):
        runs = [r["curve"] for r in records if r["setup"] == name]
        at = [step for step, _ in runs[0]]
        mean = [statistics.mean(run[i][1] for run in runs) for i in range(len(at))]
        for run in runs:
            panel.plot(at, [loss for _, loss in run], color=COLOURS[name], lw=0.7, alpha=0.35)
        panel.plot(at, mean, color=COLOURS[name], lw=1.8, label=SETUPS[name].label)
    panel.set_xlabel("step")
    panel.set_ylabel("held-out loss")
    panel.grid(axis="y", color=FAINT, lw=0.8)
    panel.legend(frameon=False, fontsize=8)


__all__ = ["draw", "line", "markdown", "summarise", "write"]
