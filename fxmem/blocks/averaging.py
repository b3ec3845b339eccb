"""Averages of the gradients that update weights inside the backward, over processes.

Ranks reduce in one order, whatever order their gradients arrive in: that depends on the length of
their batch, on its chunks and on what packing leaves out. The order is the first rank's order of
use, backwards. A gradient waits for its turn; one that never comes counts as zeros when the
backward ends. So every rank makes the same reductions before its ``backward()`` returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxmem.blocks.policies import mean_over_processes, world_size


class Averager:
    """Gradients of one backward; ``apply(parameter, mean)`` is called in the common order.
    ``group``: the processes; None stands for all.
    """

    def __init__(
        self,
        names: Mapping[nn.Parameter, str],
        apply: Callable[[nn.Parameter, Tensor], None],
        group: dist.ProcessGroup | None,
    ) -> None:
        self._names, self._apply, self._group = names, apply, group
        self._order: list[str] | None = None
        self._left: list[nn.Parameter] = []
        self._others: list[nn.Parameter] = []
        self._ready: dict[nn.Parameter, Tensor] = {}
        self.active = False

    def begin(self, updated: Iterable[nn.Parameter], first_use: Mapping[nn.Parameter, int]) -> None:
        """A backward begins that updates these parameters; their positions in the graph."""
        if self._order is None:
            used = sorted(first_use, key=lambda p: first_use[p])
            self._order = _of_first_rank([self._names[p] for p in used], self._group)
        members = {self._names[p]: p for p in updated}
        self._left = [members.pop(n) for n in self._order if n in members]
        # what the first rank does not use is reduced where some rank has it
        self._others = [p for p in self._names if self._names[p] in members]
        self.active = True

    def put(self, parameter: nn.Parameter, grad: Tensor) -> None:
        """One complete gradient; it is the callee's to overwrite."""
        self._ready[parameter] = grad
        while self._left and self._left[-1] in self._ready:
            self._reduce(self._left.pop())

    def finish(self) -> None:
        """No more gradients will come."""
        if not self.active:
            return
        self.active = False
        while self._left:
            self._reduce(self._left.pop())
        if self._others:
            found = torch.tensor([p in self._ready for p in self._others], dtype=torch.int32)
            found = found.to(self._others[0].device)
            if world_size(self._group) > 1:
                dist.all_reduce(found, group=self._group)
            for p, count in zip(self._others, found.tolist(), strict=True):
                if count:
                    self._reduce(p)
        self._others = []

    def clear(self) -> None:
        """Forget what waits."""
        self._left, self._others, self.active = [], [], False
        self._ready.clear()

    def _reduce(self, parameter: nn.Parameter) -> None:
        grad = self._ready.pop(parameter, None)
        wide = torch.promote_types(parameter.dtype, torch.float32)
        own = torch.zeros_like(parameter, dtype=wide) if grad is None else grad.to(wide)
        self._apply(parameter, mean_over_processes(own.contiguous(), self._group))


def _of_first_rank(names: list[str], group: dist.ProcessGroup | None) -> list[str]:
    if world_size(group) == 1:
        return names
    box: list[list[str] | None] = [names if dist.get_rank(group) == 0 else None]
    device = torch.device("cuda") if dist.get_backend(group) == "nccl" else None
    dist.broadcast_object_list(box, group=group, group_src=0, device=device)
    assert box[0] is not None
    return box[0]


__all__ = ["Averager"]
