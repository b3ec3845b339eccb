"""Which block is active in which optimizer step.

Only (order, seed, count, steps, step) decide, so nothing needs saving beyond those numbers and the
global random generator is never touched.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from fxmem.errors import PlanError
from fxmem.plan.blocks import ORDERS


@dataclass(frozen=True, slots=True)
class Schedule:
    """Exactly `steps` optimizer steps per visit, each of `count` blocks once per block-epoch, but
    for ``"sampled"`` and ``"fixed"``.

    Attributes:
        count: number of blocks; block 0 is nearest the input.
        steps: optimizer steps per visit.
        order: ``"random"`` draws a new permutation per block-epoch, ``"sampled"`` a block for
            every visit, with replacement; ``"ascending"`` starts at the input, ``"descending"`` at
            the output, ``"fixed"`` stays on block `start`.
        seed: seed of the permutations.
        start: the block of ``"fixed"``.
        compat: the released code's first visit, one step short (microsoft/BlockOptimizers).

    Raises:
        PlanError: unknown order, or a count, steps or start that cannot work.
    """

    count: int
    steps: int
    order: str = "random"
    seed: int = 0
    start: int = 0
    compat: bool = False

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise PlanError(f"order is {self.order!r}", advice=f"allowed: {', '.join(ORDERS)}")
        if self.count < 1 or self.steps < 1 or not 0 <= self.start < self.count:
            raise PlanError(
                f"count {self.count}, steps {self.steps}, start {self.start} cannot work",
                advice="count and steps at least 1, start below count",
            )

    def visit(self, step: int) -> tuple[int, int]:
        """(visit, steps already done in it) before optimizer step `step`, counted from 0."""
        return divmod(step + self.compat, self.steps)

    def block(self, step: int) -> int:
        """The block that is active in optimizer step `step`, counted from 0."""
        epoch, position = divmod(self.visit(step)[0], self.count)
        return self.permutation(epoch)[position]

    def permutation(self, epoch: int) -> list[int]:
        """The blocks of one block-epoch in the order of their visits."""
        if self.order == "fixed":
            return [self.start] * self.count
        blocks = list(range(self.count))
        if self.order == "descending":
            blocks.reverse()
        if self.order == "sampled":
            draw = random.Random(f"{self.seed}/{epoch}")
            return [draw.randrange(self.count) for _ in blocks]
        if self.order == "random":
            random.Random(f"{self.seed}/{epoch}").shuffle(blocks)
        return blocks
