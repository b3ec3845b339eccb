"""A stand-in for an output that was never made whole: it has a shape, a dtype and no values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxmem._compat import graph as _compat
from fxmem.axes.sizes import Size, degree, evaluate_shape, per_token
from fxmem.errors import DroppedLogitsError
from fxmem.frontend.capture import Capture, is_tensor, live, value_of

KEEP_PER_TOKEN = 8
"""Elements per token up to which an output that wants a gradient leaves the graph (metrics,
log-probs).
"""


_COPIES = {getattr(torch.ops.aten, n).default for n in ("clone", "detach", "alias", "_to_copy")}
_SHAPES = {getattr(torch.ops.aten, n).default for n in ("view", "_unsafe_view", "expand")}


class DroppedTensor(torch.Tensor):
    """Any operation that needs values raises :class:`~fxmem.errors.DroppedLogitsError`.

    A copy, also to another dtype or device, is another stand-in: wrappers such as
    DistributedDataParallel and accelerate copy whatever a model returns.
    """

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch types it as an instance method
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        x = args[0]
        if isinstance(x, cls):
            kwargs = kwargs or {}
            if func in _COPIES:
                dtype, device = kwargs.get("dtype"), kwargs.get("device")
                return _stand_in(tuple(x.shape), dtype or x.dtype, device or x.device)
            if func in _SHAPES and tuple(args[1]) == tuple(x.shape):
                return _stand_in(tuple(x.shape), x.dtype, x.device)
        raise _error(str(func))

    def __deepcopy__(self, memo: Any) -> Any:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _stand_in, (tuple(self.shape), self.dtype, self.device)

    def tolist(self) -> Any:
        # torch itself refuses these two for any subclass, before an op is dispatched
        raise _error("tolist")

    def numpy(self, *, force: bool = False) -> Any:
        raise _error("numpy")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DroppedTensor(shape={tuple(self.shape)}, dtype={self.dtype})"


def _error(op: str) -> DroppedLogitsError:
    return DroppedLogitsError("the logits of a streamed training step were asked for", op=op)


def dropped(
    shape: Sequence[Size], sizes: dict[str, int], dtype: torch.dtype, device: torch.device
) -> DroppedTensor:
    """A stand-in of the given symbolic shape."""
    return _stand_in(evaluate_shape(shape, sizes), dtype, device)


def _stand_in(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> DroppedTensor:
    made: DroppedTensor = _compat.wrapper_tensor(DroppedTensor, shape, dtype, device)
    return made


@dataclass(frozen=True, slots=True)
class Dropped:
    """An output that does not leave the graph."""

    value: Tensor


def _widened(capture: Capture, output: fx.Node) -> bool:
    """Whether every way back through values of the same width ends at a narrower state."""
    width = per_token(capture.shape(output))
    ahead, seen = [output], {output}
    while ahead:
        learned = [
            n for n in ahead.pop().all_input_nodes
            if n in capture.main_set and is_tensor(n) and value_of(n).requires_grad
        ]  # fmt: skip
        widths = {n: per_token(capture.shape(n)) for n in learned}
        if not learned or any(w > width for w in widths.values()):
            return False
        same = [n for n, w in widths.items() if w == width and n not in seen]
        seen.update(same)
        ahead += same
    return True


def drop_outputs(capture: Capture, *, states: bool = False) -> None:
    """With a scalar loss, streamed activations do not leave the graph; what does not grow with the
    length does.

    ``states``: those that leave it are wanted, such as what a hook has kept, or the state of an
    encoder; only what is wider than what it is made from, as logits are, stays inside. A cache of
    keys and values that a model makes for nobody has states too, and of every layer.
    """
    nodes = [o for o in capture.outputs if isinstance(o, fx.Node) and is_tensor(o)]
    if not any(
        o in capture.main_set and value_of(o).dim() == 0 and value_of(o).requires_grad
        for o in nodes
    ):
        return
    drop = set()
    for o in nodes:
        learned = o in capture.main_set and value_of(o).requires_grad
        shape = capture.shape(o)
        wide = degree(shape) > 0 and per_token(shape) > KEEP_PER_TOKEN
        if learned and wide and not (states and not _widened(capture, o)):
            drop.add(o)
    capture.outputs = [
        Dropped(value_of(o)) if isinstance(o, fx.Node) and o in drop else o for o in capture.outputs
    ]
    needed = live(capture.main, (o for o in capture.outputs if isinstance(o, fx.Node)))
    gone = capture.main_set - needed
    capture.nodes = [n for n in capture.nodes if n not in gone]
    capture.main = [n for n in capture.main if n in needed]
    capture.main_set = frozenset(capture.main)
