"""Clipping, the non-finite guard and averaging of gradients that update inactive weights."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fxmem.errors import BlockStateError


def world_size() -> int:
    """Processes of the default group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def check_world(average: bool) -> None:
    """Refuse several processes whose gradients nobody averages.

    Raises:
        BlockStateError: more than one process and no averaging.
    """
    if world_size() > 1 and not average:
        raise BlockStateError(
            "several processes train, but updates inside the backward are not averaged; "
            "DistributedDataParallel comes too late for them",
            advice="set Blocks(average=True) and do not wrap the model",
        )


def mean_over_processes(grad: Tensor) -> Tensor:
    """The mean over the default group, in place where there is one."""
    if (count := world_size()) > 1:
        dist.all_reduce(grad)
        grad /= count
    return grad


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

    def __call__(self, grad: Tensor, tensors: int) -> Tensor:
        """The clipped gradient of one of ``tensors`` parameters; ``grad`` stays as it is."""
        if self.kind == "value":
            return grad.clamp(-self.limit, self.limit)
        if self.kind == "per_tensor":
            norm = torch.linalg.vector_norm(grad, dtype=_wide(grad))
            factor = (self.limit / tensors**0.5 / norm.clamp_min(1e-30)).clamp_max(1.0)
            return grad * factor.to(grad.dtype)
        if self.kind == "delayed":
            norm = torch.linalg.vector_norm(grad, dtype=_wide(grad))
            self._squares.append(norm.double().square())
            if self.last_norm is not None and self.last_norm > self.limit:
                return grad * (self.limit / self.last_norm)
        return grad

    def end_step(self) -> None:
        """The norm of this step counts in the next; one that is not finite is dropped."""
        if self._squares:
            norm = float(torch.stack(self._squares).sum().sqrt())
            if norm < float("inf"):
                self.last_norm = norm
            self._squares = []


class Guard:
    """A flag on each device: a gradient of this step was not finite. Checks do not wait for the
    device.
    """

    def __init__(self) -> None:
        self._flags: dict[torch.device, Tensor] = {}

    def check(self, grad: Tensor) -> None:
        """Raise the flag if ``grad`` has an entry that is not finite."""
        # one pass and no copy: a sum is finite only if every entry is; not so where it overflows
        if grad.device.type == "cpu" and float(grad.sum(dtype=_wide(grad)).abs()) < float("inf"):
            return
        bad = ~grad.isfinite().all()
        before = self._flags.get(grad.device)
        self._flags[grad.device] = bad if before is None else before | bad

    def down(self, device: torch.device) -> bool | None:
        """Whether nothing was raised on a device; None where asking would wait for it."""
        flag = self._flags.get(device)
        if flag is None:
            return True
        return not bool(flag) if device.type == "cpu" else None

    def select(self, moved: Tensor, kept: Tensor) -> Tensor:
        """``moved`` while the flag is down, else ``kept``."""
        flag = self._flags.get(moved.device)
        return moved if flag is None else torch.where(flag, kept, moved)

    def raised(self) -> bool:
        """Whether any flag is up; waits for the device."""
        return any(bool(flag) for flag in self._flags.values())

    def clear(self) -> None:
        self._flags = {}


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


__all__ = ["Clip", "Guard", "check_world", "mean_over_processes", "world_size"]
