"""Bytes over one step, by what they are for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fxmem._compat.memory import StorageWatch
from fxmem.runtime.profile import inside_op

KINDS = ("gradients", "saved", "working")
"""Of parameters; what waits for the backward; everything else."""


@dataclass(frozen=True, eq=False, slots=True)
class Steps:
    """Bytes at the moments of a step, in order, above what was there before.

    Attributes:
        bytes: ``[moments, 3]``, by :data:`KINDS`.
        made: bytes of the tensors that each moment makes, where that is known.
    """

    bytes: npt.NDArray[np.int64]
    made: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.bytes)

    @property
    def peak(self) -> int:
        return int(self.bytes.sum(1).max(initial=0))

    @property
    def largest(self) -> tuple[int, int, int]:
        """The bytes by kind at the peak."""
        if not len(self.bytes):
            return 0, 0, 0
        gradients, saved, working = self.bytes[self.bytes.sum(1).argmax()].tolist()
        return gradients, saved, working

    def widens(self, shorter: Steps, ratio: float) -> bool:
        """Some tensor grows faster than the length, which has grown by ``ratio``."""
        if self.made is None or shorter.made is None:
            return True
        return bool((self.made > shorter.made * ratio * 1.001).any())


class Recording(StorageWatch):
    """Remembers when each storage of a run over fake tensors came and went.

    Args:
        workspaces: count what operators of a CPU allocate within themselves.
    """

    def __init__(self, workspaces: bool) -> None:
        super().__init__(inside_op if workspaces else None)
        self._alive: dict[int, tuple[int, int]] = {}
        self._gone: list[tuple[int, int, int, int]] = []
        self._inner: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        self.peak = 0
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self._inner.append(max(0, self.peak - self.live))
        return result

    def came(self, key: int, size: int) -> None:
        super().came(key, size)
        self._alive[key] = len(self._inner), size

    def gone(self, key: int, ref: Any = None) -> None:
        super().gone(key)
        start, size = self._alive.pop(key)
        self._gone.append((key, start, len(self._inner), size))

    def waiting(self) -> set[tuple[int, int]]:
        """Storages alive now, by key and by the operator that has made them."""
        return {(key, start) for key, (start, _) in self._alive.items()}

    def steps(self, saved: set[tuple[int, int]], gradients: Sequence[torch.Tensor]) -> Steps:
        """One moment per operator; ``saved``: what has waited for the backward."""
        final = {self.owner(g)[0] for g in gradients}
        count = len(self._inner)
        changes = np.zeros((count + 1, len(KINDS)), np.int64)
        made = np.zeros(count, np.int64)
        spans = [*self._gone, *((k, s, count, b) for k, (s, b) in self._alive.items())]
        for key, start, end, size in spans:
            kind = 0 if key in final and end == count else 1 if (key, start) in saved else 2
            changes[start, kind] += size
            changes[end, kind] -= size
            made[start] = max(made[start], size)
        levels = changes.cumsum(0)[:-1]
        levels[:, 2] += self._inner
        return Steps(levels, made)
