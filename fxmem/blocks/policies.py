"""Clipping, the non-finite guard and averaging of gradients that update inactive weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fxmem.blocks.shards import local, sum_of_parts
from fxmem.errors import BlockStateError


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Processes of the group, at first of all; 1 where there is none."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def check_world(average: bool) -> None:
    """Refuse several processes whose gradients nobody averages.

    Raises:
        BlockStateError: more than one process and no averaging.
    """
    if world_size() > 1 and not average:
        raise BlockStateError(
            "several processes train, but updates inside the backward are not averaged",
            advice="wrap the model by DistributedDataParallel, shard it by fully_shard, or set "
            "Blocks(average=True)",
        )


def mean_over_processes(grad: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The mean over the group, in place where there is one."""
    if (count := world_size(group)) > 1:
        dist.all_reduce(grad, group=group)
        grad /= count
    return grad


def average_gradients(
    parameters: Sequence[Tensor], mean: Callable[[Tensor], Tensor] = mean_over_processes
) -> None:
    """Average every ``.grad`` that some process has; one that is None counts as zeros there."""
    if world_size() == 1 or not parameters:
        return
    there = [float(p.grad is not None) for p in parameters]
    found = mean(torch.tensor(there, device=parameters[0].device))
    for p, some in zip(parameters, found.tolist(), strict=True):
        if some:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            mean(p.grad)


def is_last_micro_batch() -> bool:
    """What accelerate says of the current forward (``sync_gradients``, which the Trainer sets,
    too); True where accelerate is not in use.
    """
    state = sys.modules.get("accelerate.state")
    return state is None or bool(state.GradientState().sync_gradients)


def check_precision(parameters: Iterable[Tensor]) -> None:
    """Refuse float16, by autocast or of a parameter: gradients then carry a loss scaler's factor.

    Raises:
        BlockStateError: names the way out.
    """
    autocast = any(
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is torch.float16
        for kind in ("cpu", "cuda")
    )
    if autocast or any(p.dtype is torch.float16 for p in parameters):
        raise BlockStateError(
            "float16 trains with a scaled loss, and updates inside the backward would be scaled, "
            "too",
            advice="use bfloat16, or Blocks(inactive=None) or LowRank",
        )


class Clip:
    """Clipping of updates; ``delayed`` uses the global norm of the optimizer step before.

    Args:
        kind: ``none``, ``value``, ``per_tensor`` or ``delayed``.
        limit: largest entry or norm.
    """

    def __init__(self, kind: str, limit: float) -> None:
        self.kind, self.limit = kind, limit
        self.last_norm: float | None = None
        self._squares: list[Tensor] = []

    def factor(self, grad: Tensor, scale: float, tensors: int) -> Tensor | float:
        """What to multiply ``scale * grad`` with, the gradient of one of ``tensors`` parameters,
        or of a shard.
        """
        if self.kind not in ("per_tensor", "delayed"):
            return 1.0
        norm = torch.linalg.vector_norm(local(grad), dtype=_wide(grad))
        norm = scale * sum_of_parts(norm.square(), grad).sqrt()
        if self.kind == "per_tensor":
            return (self.limit / tensors**0.5 / norm.clamp_min(1e-30)).clamp_max(1.0)
        self._squares.append(norm.double().square())
        if self.last_norm is not None and self.last_norm > self.limit:
            return self.limit / self.last_norm
        return 1.0

    def end_step(self) -> None:
        """The norm of this step counts in the next; one that is not finite is dropped."""
        if self._squares:
            norm = float(torch.stack(self._squares).sum().sqrt())
            if norm < float("inf"):
                self.last_norm = norm
            self._squares = []


class Guard:
    """A flag on each device: a gradient of this step was not finite.

    Only the CPU's flag is read at once; checks do not wait for any other device.
    """

    def __init__(self) -> None:
        self._flags: dict[torch.device, Tensor] = {}

    def check(self, grad: Tensor) -> None:
        """Raise the flag if ``grad``, or another rank's part of it, has an entry that is not
        finite.
        """
        bad = ~_largest(local(grad)).isfinite()
        self._note(sum_of_parts(bad.float(), grad) > 0)

    def blocks(self, device: torch.device) -> bool:
        """The flag is known to be up; False where knowing it would wait for the device."""
        return self._readable(device) and bool(self._flags.get(device, False))

    def select_(self, grad: Tensor) -> Tensor:
        """``grad``, in place all zeros where the flag is up: never zero times something."""
        flag = self._flags.get(grad.device)
        return grad if flag is None or self._readable(grad.device) else grad.masked_fill_(flag, 0)

    def factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor] | None:
        """``a`` and ``b`` where every entry of ``a @ b`` is sure to be finite, else None (on the
        CPU: look at the product) or zeros (with the flag up).

        Entries of the product are at most max |a| max |b| k for ``a [m, k]``.
        """
        bound = _largest(a).double() * _largest(b).double() * a.shape[1]
        unsure = ~(bound < torch.finfo(a.dtype).max / 2)
        if self._readable(a.device):
            return None if bool(unsure) or self.blocks(a.device) else (a, b)
        self._note(unsure)
        flag = self._flags[a.device]
        return a.masked_fill(flag, 0), b.masked_fill(flag, 0)

    def raised(self) -> bool:
        """Whether any flag is up; waits for the device."""
        return any(bool(flag) for flag in self._flags.values())

    def clear(self) -> None:
        self._flags = {}

    def _note(self, bad: Tensor) -> None:
        before = self._flags.get(bad.device)
        self._flags[bad.device] = bad if before is None else before | bad

    def _readable(self, device: torch.device) -> bool:
        return device.type == "cpu"


def _largest(x: Tensor) -> Tensor:
    """Largest magnitude; NaN where there is one; 0 of nothing."""
    if not x.numel():
        return x.new_zeros(())
    return torch.linalg.vector_norm(x, float("inf"))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


__all__ = [
    "Clip", "Guard", "average_gradients", "check_precision", "check_world",
    "is_last_micro_batch", "mean_over_processes", "world_size",
]  # fmt: skip
