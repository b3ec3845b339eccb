"""Private names of torch for sizes that a capture is not to fix, and for those that it has to.

Windows over a picture, padded and shifted, make sizes that are quotients of remainders of quotients
of its height and width. Each such division is simplified by sympy, which takes minutes once it has
a hundred terms. A picture is not cut along its height or width: they are fixed there, and a picture
of other sizes is captured anew. Batches and lengths stay symbols.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from itertools import islice
from typing import Any

import sympy
from torch._dynamo.source import TensorProperty, TensorPropertySource
from torch.fx.experimental.sym_node import SymNode

from fxmem._compat.dynamo_gaps import capturing

__all__ = ["TERMS", "FixedSizeError", "demanded", "keep_symbolic"]

TERMS = 64
"""What has as many terms is divided only after the sizes of pictures in it are fixed."""
_LOCAL = threading.local()


class FixedSizeError(Exception):
    """The captured code needs the value of a size that is to stay symbolic, such as a loop over
    it."""


@contextlib.contextmanager
def keep_symbolic(sizes: set[int]) -> Iterator[None]:
    """Code captured by this thread meanwhile must not need the value of a size that is one of
    ``sizes`` now; an empty set takes the demand back.
    """
    before = getattr(_LOCAL, "kept", None)
    _LOCAL.kept, _LOCAL.demanded = sizes, False
    try:
        yield
    finally:
        _LOCAL.kept = before


def demanded() -> bool:
    """Whether the latest capture of this thread has ended with a :class:`FixedSizeError`."""
    return getattr(_LOCAL, "demanded", False)


def _is_kept(size: SymNode) -> bool:
    kept = getattr(_LOCAL, "kept", None) or set()
    known = size.shape_env.backed_var_to_val if kept else {}
    return not kept.isdisjoint(int(known.get(s, 0)) for s in size.expr.free_symbols)


def _guard_int(self: SymNode, file: str, line: int) -> int:
    if _is_kept(self):
        _LOCAL.demanded = True
        raise FixedSizeError(f"the code needs the value of a size, {self.expr}")
    return _PLAIN_GUARD_INT(self, file, line)


def _divides(plain: Any) -> Any:
    def divided(self: SymNode, other: SymNode) -> SymNode:
        if capturing() and (_has_many_terms(self.expr) or _has_many_terms(other.expr)):
            for size in (*_of_pictures(self), *_of_pictures(other)):
                if not _is_kept(size):
                    size.guard_int(__file__, 0)
        return plain(self, other)

    return divided


def _has_many_terms(size: sympy.Basic) -> bool:
    return any(True for _ in islice(sympy.preorder_traversal(size), TERMS, None))


def _of_pictures(size: SymNode) -> Iterator[SymNode]:
    """The symbols in ``size`` that are read from tensors of four or more axes only, behind the
    first of them.
    """
    env = size.shape_env
    places = {s: [_place(p) for p in found] for s, found in env.var_to_sources.items()}
    axes: dict[str, int] = {}
    for base, axis in (p for found in places.values() for p in found):
        axes[base] = max(axis, axes.get(base, 0))
    for symbol in sorted(size.expr.free_symbols, key=str):
        found = places.get(symbol)
        if found and all(axis > 0 and axes[base] >= 3 for base, axis in found):
            yield SymNode(symbol, env, int, None)


def _place(source: Any) -> tuple[str, int]:
    """The tensor that a size is read from and the axis there; no axis is above 0 for others."""
    if isinstance(source, TensorPropertySource) and source.prop is TensorProperty.SIZE:
        return source.base.name, source.idx or 0
    return "", 0


_PLAIN_GUARD_INT: Any = SymNode.guard_int
SymNode.guard_int = _guard_int
for name in ("floordiv", "int_floordiv", "mod"):
    if (method := getattr(SymNode, name, None)) is not None:
        setattr(SymNode, name, _divides(method))
