"""Which rewrite makes a result wrong: the same run with more and with less fuel."""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxmem.compiler import region_codes
from fxmem.errors import VerificationError
from fxmem.rewriting import pipeline
from fxmem.rewriting.fuel import NAME, fuelled
from fxmem.rewriting.text import lines


@dataclass(frozen=True, slots=True)
class Culprit:
    """The first rewrite that makes a result wrong.

    Attributes:
        number: how many rewrites there were with it: ``FXMEM_FUEL`` of one less is still right.
        name: the pass.
        where: the graph or program it rewrote; empty for the captured graph.
        diff: what it changed, as a unified diff of nodes.
    """

    number: int
    name: str
    where: str
    diff: str

    def __str__(self) -> str:
        at = f" of {self.where}" if self.where else ""
        return f"rewrite {self.number} ({NAME}): {self.name}{at}\n{self.diff}"


def bisect(fn: Callable[..., bool], inputs: Sequence[Any] = ()) -> Culprit | None:
    """Find the rewrite that makes a result wrong.

    ``fn(*inputs)`` transforms a model, runs it, and returns whether the result is right, always
    the same with the same rewrites. It is called about ``2 + log2(rewrites)`` times. What it raises
    counts as wrong, but for the first call, which does without rewrites. Rewrites that no program
    can do without are always done.

    Returns:
        The first rewrite that makes it wrong; None where the result is right with all of them.

    Raises:
        VerificationError: the result is wrong without any rewrite.
    """
    right, _ = _trial(fn, inputs, 0, 0)
    if isinstance(right, Exception):
        raise right
    if not right:
        raise VerificationError(
            "the result is wrong without any rewrite",
            advice="compare what `fn` takes as right with plain autograd in float64; if that is "
            "right, please report it",
        )  # fmt: skip
    right, seen = _trial(fn, inputs, None, 0)
    if right is True:
        return None
    low, high = 0, seen.asked
    while high - low > 1:
        middle = (low + high) // 2
        right, _ = _trial(fn, inputs, middle, 0)
        print(f"{NAME}={middle}: {'right' if right is True else 'wrong'}", file=sys.stderr)
        low, high = (middle, high) if right is True else (low, middle)
    (_, before), (_, after) = (_trial(fn, inputs, n, high) for n in (low, high))
    diff = difflib.unified_diff(before.text, after.text, "right", "wrong", lineterm="")
    return Culprit(high, after.name, after.where, "\n".join(diff))


@dataclass(slots=True)
class _Seen:
    """How many rewrites have asked for fuel, and what the run of the pass left that asked for the
    one that was looked for.
    """

    asked: int = 0
    name: str = ""
    where: str = ""
    text: tuple[str, ...] = ()


def _trial(
    fn: Callable[..., bool], inputs: Sequence[Any], limit: int | None, number: int
) -> tuple[bool | Exception, _Seen]:
    """Whether the result is right with ``limit`` rewrites; looks for rewrite ``number``."""
    seen = _Seen()
    with _nothing_kept(), fuelled(limit) as tank:

        def observe(applied: pipeline.Applied[Any]) -> None:
            if seen.asked < number <= tank.asked:
                seen.name, seen.where = applied.name, applied.where
                seen.text = tuple(lines(applied.after))
            seen.asked = tank.asked

        pipeline.OBSERVERS.append(observe)
        try:
            right: bool | Exception = bool(fn(*inputs))
        except Exception as error:
            right = error
        finally:
            pipeline.OBSERVERS.remove(observe)
    return right, seen


@contextlib.contextmanager
def _nothing_kept() -> Iterator[None]:
    """Without captures and code of earlier runs, and without keeping what is made meanwhile."""
    torch.compiler.reset()
    try:
        with region_codes._CODES.set_aside():
            yield
    finally:
        torch.compiler.reset()
