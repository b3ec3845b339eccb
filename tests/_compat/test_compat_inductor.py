"""One small check per private torch name that compiling chunk bodies and watching storages use.

The rest of the names is checked in ``test_compat.py``.
"""

from __future__ import annotations

import contextlib
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
from torch._guards import TracingContext
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental import _config as symbolic_config
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

from fxmem._compat import inductor as _compat_inductor
from fxmem._compat.inductor import Symbolic


@pytest.mark.parametrize("mode", [contextlib.nullcontext, FakeTensorMode])
def test_a_storage_is_one_python_object_that_knows_its_death(mode: Any) -> None:
    gone: list[object] = []
    with mode():
        x = torch.empty(4, requires_grad=True).exp()
        y = x.exp()  # saved for the backward
        ref = weakref.ref(y.untyped_storage(), gone.append)
        assert y.untyped_storage()._cdata == y[1:].untyped_storage()._cdata
        assert y.untyped_storage()._cdata != y.clone().untyped_storage()._cdata
        total = y.sum()
        del y
        assert not gone
        total.backward()
        del total
        assert gone == [ref]


def test_a_dispatch_mode_sees_every_op_below_autograd() -> None:
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.ones(3, requires_grad=True)
    with Mode():
        (x * 2).sum().backward()
    assert seen[:2] == ["aten.mul.Tensor", "aten.sum.default"] and "aten.expand.default" in seen


def test_sizes_are_independent_symbols_that_may_be_zero_or_one() -> None:
    sizes = Symbolic.of({"a": 5, "b": 5})
    a, b = (sympy.Symbol(n, integer=True) for n in "ab")
    assert isinstance(sizes.env, ShapeEnv) and DimDynamic.DYNAMIC
    assert [sizes.expr(sizes.ints[n]) for n in "ab"] == [a, b], "no two sizes are taken for one"
    x = sizes.tensor([2 * a, b], [b, sympy.Integer(1)], torch.float32, torch.device("cpu"))
    with sizes.running():
        y = x.reshape(sizes.ints["a"], -1)
    assert sizes.expr(y.shape[1]) == 2 * b and sizes.guards() == []
    assert hasattr(symbolic_config, "backed_size_oblivious")


def test_what_tracing_assumes_is_a_guard_over_the_names() -> None:
    sizes = Symbolic.of({"a": 6})
    assert sizes.ints["a"] > 4
    (guard,) = sizes.guards()
    values = {s: sympy.Integer(3) for s in guard.free_symbols}
    assert {str(s) for s in guard.free_symbols} == {"a"} and not bool(guard.xreplace(values))


def compiled(donated: tuple[int, ...] = ()) -> Any:
    sizes = Symbolic.of({"n": 9})
    n = sympy.Symbol("n", integer=True)
    x = sizes.tensor([n, sympy.Integer(4)], [sympy.Integer(4), sympy.Integer(1)], torch.float32,
                     torch.device("cpu"))  # fmt: skip
    assert callable(compile_fx_inner) and select_decomp_table()
    return _compat_inductor.compile_segment(
        lambda n, x: ((x.exp() + 1) * n,), sizes, [sizes.ints["n"], x], donated
    )


@pytest.mark.parametrize("donated", ((), (1,)))
def test_a_segment_compiles_for_every_size_and_empties_its_arguments(
    donated: tuple[int, ...],
) -> None:
    context = TracingContext(None)
    context.fw_metadata = SimpleNamespace(bw_donated_idxs=[0])  # type: ignore[assignment]
    before = sum(_compat_inductor.cache_counters())
    run = compiled(donated)
    assert sum(_compat_inductor.cache_counters()) == before + 1
    for n in (9, 3, 1):
        x = torch.randn(n, 4)
        want, at = (x.exp() + 1) * n, x.data_ptr()
        held = [n, x]
        del x
        (got,) = run(held)
        assert held == [] and torch.allclose(got, want)
        assert not donated or got.data_ptr() == at, "a donated input's memory holds the result"
