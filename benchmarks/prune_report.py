"""Records of the pruning benchmark into JSON, a markdown table and pictures."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

MIB = 2**20
Record = dict[str, Any]
COLUMNS: tuple[tuple[str, Callable[[Record], Any], str], ...] = (
    ("removed", lambda r: r.get("removed"), "{:.1%}"),
    ("of all", lambda r: r.get("removed_of_all"), "{:.1%}"),
    ("perplexity", lambda r: r.get("perplexity"), "{:.2f}"),
    ("BLiMP", lambda r: r.get("blimp"), "{:.1%}"),
    ("stack ms", lambda r: r.get("stack_ms"), "{:.0f}"),
    ("stack", lambda r: r.get("stack_speedup"), "{:.2f}x"),
    ("whole ms", lambda r: r.get("whole_ms"), "{:.0f}"),
    ("whole", lambda r: r.get("whole_speedup"), "{:.2f}x"),
    ("peak MiB", lambda r: r["peak_bytes"] / MIB if "peak_bytes" in r else None, "{:.0f}"),
    ("weights MiB", lambda r: r["parameter_bytes"] / MIB if "parameter_bytes" in r else None,
     "{:.0f}"),
    ("steps", lambda r: r.get("steps"), "{}"),
    ("snapshots", lambda r: r.get("instantiations"), "{}"),
    ("forwards", lambda r: r.get("forwards"), "{}"),
    ("tokens", lambda r: r.get("tokens"), "{:,}"),
    ("s to find", lambda r: r.get("find_seconds"), "{:.0f}"),
)  # fmt: skip


def save(records: Sequence[Record], options: Any) -> None:
    """``prune.json``, ``prune.md`` and ``prune.png`` in the options' folder."""
    options.out.mkdir(parents=True, exist_ok=True)
    about = {
        "options": {k: v for k, v in asdict(options).items() if k != "out"},
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {options.threads} thread",
        "records": list(records),
    }
    about["options"]["model"] = str(options.model).rstrip("/").rpartition("/")[2]
    about["options"]["blimp"] = options.blimp is not None
    (options.out / "prune.json").write_text(json.dumps(about, indent=1) + "\n")
    (options.out / "prune.md").write_text(table(records, options))
    draw(records, options)


def table(records: Sequence[Record], options: Any) -> str:
    """The markdown page."""
    o = options
    lines = [
        f"Pruning of {str(o.model).rstrip('/').rpartition('/')[2]}, float32, "
        f"{o.threads} CPU thread(s).",
        "",
        f"Searches ran **{o.steps} steps** with {o.samples} masks per snapshot, at most {o.age} "
        "steps per snapshot (1 in fresh); a full search takes hundreds to thousands. "
        f"Calibration: {o.calibration} batches of {o.batch} x {o.length} tokens; held out: "
        f"{o.held} x {o.length} tokens of other topics, perplexity at length {o.length}"
        + (f"; {o.pairs} BLiMP pairs" if o.blimp else "")
        + f". Forward at {o.time_batch} x {o.time_length} tokens, best of {o.repeats}; speedups "
        "against the dense model timed in turn. Snapshots: times that sub-models were built. "
        "The search is a formulation consistent with the abstract of Gradient Reweighting "
        "(NeurIPS 2025).",
        "",
        "| keep | row | " + " | ".join(name for name, _, _ in COLUMNS) + " |",
        "|" + "---|" * (len(COLUMNS) + 2),
    ]
    for record in records:
        lead = f"| {record['keep']:g} | {record['row']} | "
        if record["status"] == "ok":
            cells = [_cell(get(record), form) for _, get, form in COLUMNS]
            lines.append(lead + " | ".join(cells) + " |")
        else:
            lines.append(lead + record["status"] + " |" + " |" * (len(COLUMNS) - 1))
    return "\n".join(lines) + "\n"


def _cell(value: Any, form: str) -> str:
    return "" if value is None else form.format(value)


def draw(records: Sequence[Record], options: Any) -> None:
    """Perplexity and forward time of the rows, one colour per kept part."""
    from matplotlib.figure import Figure

    worked = [r for r in records if r["status"] == "ok" and "whole_ms" in r]
    if not worked:
        return
    figure = Figure(figsize=(11, 1.5 + 0.28 * len(worked)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = [f"{r['row']} ({r['keep']:g})" for r in worked]
    palette = ("#00798c", "#d1495b", "#e0a030", "#7a6fac")
    keeps = sorted({r["keep"] for r in worked})
    colours = [palette[keeps.index(r["keep"]) % len(palette)] for r in worked]
    left.barh(names, [r["perplexity"] for r in worked], color=colours)
    left.set_xscale("log")
    left.set_xlabel(f"held-out perplexity; {options.steps} search steps")
    left.invert_yaxis()
    right.barh(names, [r["whole_ms"] for r in worked], color=colours)
    right.set_xlabel(f"ms per forward, {options.time_batch} x {options.time_length} tokens")
    figure.savefig(options.out / "prune.png", dpi=120)
