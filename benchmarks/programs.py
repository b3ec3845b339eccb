"""Random programs of the tests' generator, counted: ``python -m benchmarks.programs --seed 7``.

A program that fails does not end the run, as it does under ``pytest -m fuzz``, which then shrinks
it. One line for every run goes to ``benchmarks/results/programs.jsonl``: how many programs were
exact, wrong, refused by name or ended in an error of another kind, how many operators of their
joint graphs run whole, and the seconds. ``--sum`` adds the lines up.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

import fxmem
from fxmem.dynamo_backend import Backend

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/programs.jsonl"
sys.path[:0] = [str(ROOT / "tests/streaming"), str(ROOT / "tests/helpers")]
import test_programs  # noqa: E402

ENDS = ("exact", "wrong", "refused", "raw")
COUNTED = ("programs", *ENDS, "operators", "whole")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.programs", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--programs", type=int, default=250)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--sum", action="store_true", help="only add up what the file has")
    options = parser.parse_args(arguments)
    if not options.sum:
        found = run(options.seed, options.programs)
        with options.results.open("a") as file:
            print(json.dumps({"seed": options.seed, **found}), file=file)
    print(summary(map(json.loads, options.results.read_text().splitlines())))


def run(start: int, programs: int) -> dict[str, Any]:
    """What became of so many programs; those that are not exact are printed."""
    os.environ["FXMEM_REGIONS"] = "off"  # what is traced is tested, not what was kept
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()

    @seed(start)
    @settings(
        max_examples=programs, phases=[Phase.generate], database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(test_programs.cases())
    def many(case: test_programs.Case) -> None:
        counts.update(one(case))

    begun = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        many()
    return {n: counts[n] for n in COUNTED} | {"seconds": round(time.process_time() - begun)}


def one(case: test_programs.Case) -> Counter[str]:
    """One program: how it ended, and its operators."""
    made: list[Backend] = []

    def backend(plan: fxmem.Plan) -> Backend:
        made.append(Backend(plan))
        return made[-1]

    with mock.patch.object(fxmem, "backend", backend):
        try:
            test_programs.check(case)
            ended = "exact"
        except AssertionError as error:
            ended = _told("wrong", case, error)
        except fxmem.FxmemError as error:
            ended = _told("refused", case, error)
        except Exception as error:
            ended = _told("raw", case, error)
    return Counter({"programs": 1, ended: 1}) + _operators(made)


def _told(ended: str, case: test_programs.Case, error: Exception) -> str:
    print(f"{ended}: {case}: {type(error).__name__}: {error}", flush=True)
    return ended


def _operators(made: Sequence[Backend]) -> Counter[str]:
    """Of the streamed one, each region once: all, and those that run whole."""
    codes = {id(c.code): c.code for b in made[-1:] for g in b.graphs for c in g.calls}
    counts: Counter[str] = Counter()
    for code in codes.values():
        counts["operators"] += sum(n.op == "call_function" for n in code.joint.graph.nodes)
        counts["whole"] += len({b.node.name for b in code.barriers})  # a node of several programs
    return counts


def summary(runs: Iterable[Mapping[str, Any]]) -> str:
    """The sum of all runs, in a sentence or two."""
    total: Counter[str] = Counter()
    for found in runs:
        total.update({k: v for k, v in found.items() if k != "seed"})
    ends = ", ".join(f"{total[end]} {end}" for end in ENDS)
    return (
        f"{total['programs']} programs: {ends}. {100 * total['whole'] / total['operators']:.2f} % "
        f"of {total['operators']} operators whole. {total['seconds'] / 3600:.2f} hours of one "
        f"processor, {3600 * total['programs'] / total['seconds']:.0f} programs an hour."
    )


if __name__ == "__main__":
    main()
