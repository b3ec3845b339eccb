"""Private names of TRL: the LM head of its trainers, which fxmem reads as what it computes.

TRL gives the log-probability of every label by an autograd function that goes over the vocabulary
in pieces and writes them in place. Written in plain PyTorch the logits are in the captured graph,
and stream with everything else. On a GPU TRL takes the rows that have labels first, a size that
depends on values; here every row is scored, as TRL does elsewhere. Its Triton kernels for losses
need logits with values; those that are recorded take the way that TRL has for a CPU.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Head", "known", "plain_head", "spare_kernels"]

_TAKES = (
    "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size",
    "final_logit_softcapping", "logit_scale", "outputs",
)  # fmt: skip


class Head:
    """In the place of ``trl.kernels.ChunkedLogProbFunction`` (TRL 1.16)."""

    @staticmethod
    def apply(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float,
        chunk_size: int, softcap: float | None = None, logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        """Of ``hidden [N, H]``, ``weight [V, H]`` and ``targets [N]``: log-probability, entropy,
        log of the sum of squared probabilities, mean logit, whether the target is the first of the
        largest; each ``[N]``, the last four None unless they are in ``outputs``.
        """
        logits = F.linear(hidden, weight, bias)
        z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        z = z / temperature
        log_p = z.log_softmax(-1)
        chosen = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        entropy = -(log_p.exp() * log_p).sum(-1) if "entropy" in outputs else None
        with torch.no_grad():
            squares = (2 * log_p).logsumexp(-1) if "log_sum_sq_probs" in outputs else None
            mean = z.mean(-1) if "mean_logits" in outputs else None
            first = z.argmax(-1) == targets if "is_top1" in outputs else None
        return chosen, entropy, squares, mean, first


def known(function: Any) -> bool:
    """The function takes what that of TRL 1.16 takes."""
    return tuple(inspect.signature(function.forward).parameters) == _TAKES


@dataclass(slots=True)
class _Swap:
    """How many calls have the names replaced now, and what the names were."""

    calls: int = 0
    own: tuple[Any, Any] = (None, None)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def enter(self, module: Any) -> bool:
        with self.lock:
            if self.calls == 0:
                own = tuple(getattr(module, name, None) for name in _NAMES)
                if None in own or not known(own[0]):
                    return False
                self.own = own[0], own[1]
                module._ChunkedLogProbFunction, module._use_triton = Head, _no
            self.calls += 1
            return True

    def leave(self, module: Any) -> None:
        with self.lock:
            self.calls -= 1
            if self.calls == 0:
                module._ChunkedLogProbFunction, module._use_triton = self.own


_NAMES = ("_ChunkedLogProbFunction", "_use_triton")
_SWAP = _Swap()


@contextlib.contextmanager
def plain_head() -> Iterator[None]:
    """Meanwhile TRL's forward uses :class:`Head`, where TRL is there and is as it is known. Calls
    may lie within each other, and in several threads.
    """
    module: Any = sys.modules.get("trl.trainer.utils")
    if module is None or not _SWAP.enter(module):
        yield
        return
    try:
        yield
    finally:
        _SWAP.leave(module)


def spare_kernels(kind: type) -> None:
    """From now on TRL gives no tensor of this kind to its kernels, where TRL is there."""
    module: Any = sys.modules.get("trl.trainer.utils")
    own = getattr(module, _SUPPORTED, None)
    if own is None or hasattr(own, "__wrapped__"):
        return

    @functools.wraps(own)
    def supported(logits: Tensor, *rest: Any, **named: Any) -> bool:
        return not isinstance(logits, kind) and bool(own(logits, *rest, **named))

    setattr(module, _SUPPORTED, supported)


_SUPPORTED = "_supports_trl_loss_kernel"


def _no(device: torch.device) -> bool:
    return False
