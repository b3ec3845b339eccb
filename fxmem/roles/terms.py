"""Low-rank terms in plain PyTorch: what calls that are not captured compute with.

Within :class:`Terms` every function of torch that reads an adapted weight sees ``W + s up down``. A
matrix product gets the term beside it, as in captured regions, and a transposed weight stays a
view. Whatever else reads a weight is given the sum, one matrix that lives as long as it is read.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxmem._compat import graph as _compat
from fxmem._compat.overrides import tree_leaves, tree_map
from fxmem.errors import RoleError
from fxmem.frontend.low_rank_terms import FLIPS, flipped, term
from fxmem.frontend.origin import calling_line
from fxmem.roles.roles import Adapter

_PRODUCTS: dict[Any, int] = {
    F.linear: 1, torch.matmul: 1, Tensor.matmul: 1, Tensor.__matmul__: 1, torch.mm: 1, Tensor.mm: 1,
    torch.addmm: 2, Tensor.addmm: 2,
}  # fmt: skip
"""Matrix products, and the position of the right-hand matrix."""
_VALUES = frozenset({"H", "mH", "data", "real", "imag"})
"""Attributes that hold values of the weight; others tell its form alone, as these methods do."""
_FORM = frozenset({
    "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size",
    "is_contiguous", "is_floating_point", "is_complex", "get_device", "data_ptr", "__len__",
    "__set__", "requires_grad_",
})  # fmt: skip


class Terms(TorchFunctionMode):
    """``adapters()`` by weight, asked for when the first weight is read.

    Raises:
        RoleError: a function changes an adapted weight in place.
    """

    def __init__(self, adapters: Callable[[], Mapping[nn.Parameter, Adapter]]) -> None:
        super().__init__()
        self._find = adapters
        self._known: dict[Tensor, tuple[Adapter, bool]] | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        read = [a for a in tree_leaves((args, kwargs)) if self._adapter(a) is not None]
        if not read:
            return func(*args, **kwargs)
        name = func.__name__
        if name == "__get__":
            name = func.__self__.__name__
            if name not in _VALUES | FLIPS:
                return func(*args)
        if name in _FORM:
            return func(*args, **kwargs)
        if name in FLIPS:
            out = func(*args, **kwargs)
            adapter, turned = self._adapter(read[0])
            assert self._known is not None
            self._known[out] = adapter, turned != flipped(read[0], out)
            return out
        if (name.endswith("_") and not name.endswith("__") and args[0] is read[0]) or (
            kwargs.get("out") is read[0]
        ):
            raise RoleError(
                "a weight with a low-rank adapter is changed in place in a call without gradients",
                op=name, source=str(calling_line()), advice="give this weight no adapter",
            )  # fmt: skip
        at = _PRODUCTS.get(func)
        if at is not None and not kwargs and len(read) == 1 and args[at] is read[0]:
            adapter, turned = self._adapter(read[0])
            out, transposed = func(*args), turned != (func is F.linear)
            up, down = adapter.up.detach(), adapter.down.detach()
            return out + term(args[at - 1], up, down, adapter.scale, transposed).to(out.dtype)
        return func(*tree_map(self._sum, args), **tree_map(self._sum, kwargs))

    def _adapter(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        if self._known is None:
            if not isinstance(value, nn.Parameter) or hasattr(value, "device_mesh"):
                return None
            self._known = {w: (a, False) for w, a in self._find().items()}
        return self._known.get(value)

    def _sum(self, value: Any) -> Any:
        """``W + s up down``, in float32 or wider and then as the weight is."""
        if (found := self._adapter(value)) is None:
            return value
        adapter, turned = found
        wide = torch.promote_types(value.dtype, torch.float32)
        up, down = adapter.up.detach().to(wide), adapter.down.detach().to(wide)
        product = adapter.scale * (up @ down)
        return (value.to(wide) + (product.t() if turned else product)).to(value.dtype)


class Uncaptured:
    """Runs a model with the terms of its weights, as constants, where no region is captured."""

    def __init__(self, adapters: Callable[[], Mapping[nn.Parameter, Adapter]]) -> None:
        self._adapters, self._here = adapters, threading.local()

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or getattr(self._here, "inside", False):
            return run(*args, **kwargs)
        self._here.inside = True
        try:
            with Terms(self._adapters):
                return run(*args, **kwargs)
        finally:
            self._here.inside = False

    def of_part(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A call with gradients of a part by itself is no step of training, and stays plain."""
        own = run if torch.is_grad_enabled() else functools.partial(self, run)
        return own(*args, **kwargs)

    def reach(self, model: nn.Module, adapted: Iterable[nn.Parameter]) -> None:
        """Calls of parts with adapted weights, as ``generate`` makes of an encoder, too."""
        weights = set(adapted)
        for part in model.modules():
            if part is not model and _own(part) and weights.intersection(part.parameters()):
                _compat.set_compiled_call(
                    part, functools.partial(self.of_part, _compat.call_impl(part))
                )


def leave(model: nn.Module) -> None:
    """Undo :meth:`Uncaptured.reach`."""
    for part in model.modules():
        if part is not model and _own(part):
            _compat.unset_compiled_call(part)


def _own(part: nn.Module) -> bool:
    """No compiled call, or one of :class:`Uncaptured`."""
    call = _compat.compiled_call(part)
    owner = getattr(getattr(call, "func", None), "__self__", None)
    return call is None or isinstance(owner, Uncaptured)


__all__ = ["Terms", "Uncaptured", "leave"]
