"""Records of the pruning benchmark into JSON, a markdown table and pictures."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from fxmem.errors import PlanError

MIB = 2**20
Record = dict[str, Any]
COLUMNS: tuple[tuple[str, Callable[[Record], Any], str], ...] = (
    ("removed", lambda r: r.get("removed"), "{:.1%}"),
    ("of all", lambda r: r.get("removed_of_all"), "{:.1%}"),
    ("perplexity", lambda r: r.get("perplexity"), "{:.2f}"),
    ("second text", lambda r: r.get("second"), "{:.2f}"),
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
    ("sub-models", lambda r: r.get("submodels"), "{}"),
    ("their size", lambda r: r.get("built_size"), "{:.0%}"),
    ("ms to build one", lambda r: r.get("instantiate_ms"), "{:.0f}"),
    ("ms per forward", lambda r: r.get("forward_ms"), "{:.0f}"),
    ("forwards", lambda r: r.get("forwards"), "{}"),
    ("tokens", lambda r: r.get("tokens"), "{:,}"),
    ("s to find", lambda r: r.get("find_seconds"), "{:.0f}"),
)  # fmt: skip
BASELINES = ("random", "magnitude", "wanda", "taylor")
PEERS = ("torch-pruning", "torch-pruning of MLPs")
REPAIR = " + repair"
ROWS = (*BASELINES, *PEERS, "score", "gates", *(row + REPAIR for row in ("taylor", "gates")))
ORDER = ("dense", *ROWS)
LATER = ("keep", "rows", "repeats", "times", "out", "peer_seconds", "time_length", "time_batch")
"""Options that may differ when a run goes on: the rows on disk do not depend on them."""


def _asked(options: Any) -> dict[str, Any]:
    asked = {k: v for k, v in asdict(options).items() if k != "out"}
    asked["model"] = str(options.model).rstrip("/").rpartition("/")[2]
    asked["blimp"], asked["second"] = options.blimp is not None, options.second is not None
    return json.loads(json.dumps(asked))  # type: ignore[no-any-return]


def load(options: Any) -> list[Record]:
    """The rows that an earlier run with the same options left in the options' folder.

    Raises:
        PlanError: the folder holds rows of other options.
    """
    file = options.out / "prune.json"
    if not file.exists():
        return []
    there = json.loads(file.read_text())
    now = _asked(options)
    other = [k for k in now if k not in LATER and there["options"].get(k) != now[k]]
    if other:
        raise PlanError(
            f"{options.out} holds rows of other options: {', '.join(other)}",
            advice="name another --out, or remove that folder",
        )
    return list(there["records"])


def save(records: Sequence[Record], options: Any) -> list[Record]:
    """``prune.json``, ``prune.md`` and ``prune.png`` in the options' folder.

    Rows that another process put there stay; returns all, in the order of the picture.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    mine = {(r["keep"], r["row"]): r for r in records}
    there = {(r["keep"], r["row"]): r for r in load(options)}
    every = sorted((there | mine).values(), key=lambda r: (-r["keep"], ORDER.index(r["row"])))
    about = {
        "options": _asked(options),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {options.threads} thread",
        "records": every,
    }
    part = options.out / "prune.json.part"
    part.write_text(json.dumps(about, indent=1) + "\n")
    part.replace(options.out / "prune.json")
    (options.out / "prune.md").write_text(table(every, options))
    draw(every, options)
    return every


def table(records: Sequence[Record], options: Any) -> str:
    """The markdown page."""
    o = options
    lines = [
        f"Pruning of {str(o.model).rstrip('/').rpartition('/')[2]}, float32, "
        f"{o.threads} CPU thread(s).",
        "",
        f"The search by gates ran **{o.steps} steps** of {o.length} tokens, the one by scores "
        f"{o.score_steps} with {o.samples} masks and a quarter of that. "
        f"Importance: {o.calibration} batches of {o.batch} x {o.length} tokens; held out: "
        f"{o.held} x {o.length} tokens of other topics, perplexity at length {o.length}"
        + (f"; {o.pairs} BLiMP pairs" if o.blimp else "")
        + f". Forward at {o.time_batch} x {o.time_length} tokens, best of {o.repeats}; speedups "
        "against the dense model timed in turn; peak: live tensors above the weights in that "
        "forward. Snapshots: times that sub-models were built; their size: mean part of the "
        "prunable parameters in them. Seconds are of the CPU, importance and repair included. "
        "The searches are formulations consistent with the abstract of Gradient Reweighting "
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


PALETTE = ("#00798c", "#d1495b", "#e0a030", "#7a6fac", "#4f6d3a", "#333333")


def draw(records: Sequence[Record], options: Any) -> None:
    """Perplexity of the rows, one colour per kept part."""
    from matplotlib.figure import Figure

    worked = [r for r in records if r["status"] == "ok"]
    figure = Figure(figsize=(9, 1.8 + 0.3 * max(len(worked), 8)), layout="constrained")
    axes = figure.subplots()
    names = [f"{r['row']} ({r['keep']:g})" for r in worked]
    keeps = sorted({r["keep"] for r in worked})
    colours = [PALETTE[keeps.index(r["keep"]) % len(PALETTE)] for r in worked]
    bars = axes.barh(names, [r["perplexity"] for r in worked], color=colours)
    axes.bar_label(bars, fmt="%.3g", padding=3)
    axes.set_xscale("log")
    axes.margins(x=0.25)
    axes.set_xlabel(f"held-out perplexity at length {options.length}")
    axes.invert_yaxis()
    figure.savefig(options.out / "prune.png", dpi=120)
