"""Losses outside the model beside labels passed to it: ``python -m benchmarks.losses``.

All losses live together, each in a process of its own, and make one streamed step each in turn.
Peak: live tensor bytes above the parameters, gradients included. Time: relative to labels passed,
step by step, median and range.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.objectives import OUTSIDE
from benchmarks.report import MIB, timed
from benchmarks.stream import Case, Options, line, measure_group
from fxmem.demo.models import TINY
from fxmem.measure.subprocess_job import OK

INSIDE = "sft"
COLUMNS = "| loss | peak MiB | to labels passed | ms | to labels passed |\n|---|--:|--:|--:|--:|"


def markdown(records: Sequence[dict[str, Any]], title: str) -> str:
    """One row per loss."""
    inside = next(r for r in records if r["objective"] == INSIDE)
    lines = [f"# {title}", "", (__doc__ or "").split("\n\n", 1)[1].strip(), "", COLUMNS]
    for r in records:
        if r["status"] != OK:
            lines.append(f"| {r['objective']} | {r['reason']} |")
            continue
        ratios = [a / b for a, b in zip(timed(r), timed(inside), strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        name = "labels passed" if r is inside else r["objective"]
        lines.append(
            f"| {name} | {r['peak'] / MIB:.1f} | {r['peak'] / inside['peak']:.2f} "
            f"| {1000 * r['median_seconds']:.0f} | {spread} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.losses", description=__doc__)
    add = parser.add_argument
    add("--length", type=int, default=3072)
    add("--steps", type=int, default=7)
    add("--threads", type=int, default=2)
    add("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args(arguments)
    os.environ.setdefault("FXMEM_REGIONS", "off")
    options = Options(model=TINY, steps=given.steps, threads=given.threads, by_turns=True)
    cases = [Case(1, given.length, name, "fxmem") for name in (INSIDE, *OUTSIDE)]
    with tempfile.TemporaryDirectory(prefix="fxmem-benchmark-") as scratch:
        records = list(measure_group(cases, options, TINY, Path(scratch)))
    for record in records:
        print(line(record))
    given.out.mkdir(parents=True, exist_ok=True)
    table = given.out / "losses-tiny.md"
    table.write_text(markdown(records, f"tiny, float32, {given.threads} threads"))
    print(table.read_text())
    return int(any(r["status"] != OK for r in records))


if __name__ == "__main__":
    sys.exit(main())
