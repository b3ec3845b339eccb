"""Run models in float64 throughout: Hugging Face code upcasts norms and losses to float32 by name.

Inside :func:`everything_in_double` the names ``torch.float32`` and ``Tensor.float`` mean float64,
for plain autograd and for the captured graph alike, so that 1e-10 can be asked of both.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from fxmem._compat import inductor as _compat_inductor


@contextlib.contextmanager
def everything_in_double() -> Iterator[None]:
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch, "float", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


@contextlib.contextmanager
def compiled_in_double() -> Iterator[None]:
    """:func:`everything_in_double` for bodies that Inductor compiles, which sees the true names."""
    # Modules with tables of types, which they would otherwise fill while the names are others'.
    for module in ("torch._refs", "torch._inductor.decomposition", "torch._inductor.lowering"):
        importlib.import_module(module)
    compile_segment, single = _compat_inductor.compile_segment, torch.float32

    def compiled(*args: Any) -> Any:
        with mock.patch.object(torch, "float32", single), mock.patch.object(torch, "float", single):
            return compile_segment(*args)

    with (
        mock.patch.object(_compat_inductor, "compile_segment", compiled),
        everything_in_double(),
    ):
        yield


def largest_difference(
    got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]
) -> tuple[float, str]:
    """``max |got - want| / max |want|`` over all tensors, and the name where it stands.

    A gradient that is zero but for rounding (a key bias under softmax) is measured against the
    largest one.
    """
    assert got.keys() == want.keys()
    worst, at = 0.0, ""
    want = {name: ref for name, ref in want.items() if ref.numel()}
    floor = 1e-5 * max(ref.abs().max().item() for ref in want.values())
    for name, ref in want.items():
        scale = ref.abs().max().item()
        error = (got[name] - ref).abs().max().item()
        relative = error / max(scale, floor) if floor else error
        if not relative <= worst:
            worst, at = math.inf if math.isnan(relative) else relative, name
    return worst, at
