"""What PyTorch raises while it captures a model: one small check per private name."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from captures import capture
from torch import fx, nn

from fxmem._compat import errors as _compat_errors
from fxmem._compat import graph as _compat


class Breaks(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x
        return -x


def failure(call: Any, *args: Any) -> BaseException:
    torch._dynamo.reset()
    with _compat.capture_config(), pytest.raises(Exception) as caught:  # noqa: PT011
        call(*args)
    return caught.value


def test_what_cannot_be_captured_has_a_kind_a_reason_and_a_place() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Breaks()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers[0](x)  # type: ignore[no-any-return]

    error = failure(
        torch.compile(Net()._call_impl, backend="eager", fullgraph=True), torch.randn(3)
    )
    assert _compat_errors.while_capturing(error)
    assert not _compat_errors.is_user_exception(error)
    kind, reason = _compat_errors.kind_and_reason(error)
    assert kind == "Data-dependent branching"
    assert reason.startswith("Detected data-dependent branching")
    assert _compat_errors.captured_stack(error)[-1].line == "if x.sum() > 0:"
    assert "layers" in (_compat_errors.module_source(error) or "")


def test_an_exception_that_passes_a_finally_has_its_own_place() -> None:
    def inner(x: torch.Tensor) -> torch.Tensor:
        rows: Any = None if torch.compiler.is_compiling() else [x]
        return rows[0]

    def outer(x: torch.Tensor) -> torch.Tensor:
        try:
            return inner(x)
        finally:
            x.abs()

    error = failure(torch.compile(outer, backend="eager", fullgraph=True), torch.randn(3))
    names = [f.name for f in _compat_errors.raised_at(error)]
    assert (names[0], names[-1]) == ("outer", "inner")
    assert _compat_errors.captured_stack(error)[-1].line == "return rows[0]"


def test_exceptions_of_the_captured_code_are_known() -> None:
    def raises(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("mine")

    def mismatch(x: torch.Tensor) -> torch.Tensor:
        return x + torch.ones(7)

    for fn in (raises, mismatch):
        error = failure(torch.compile(fn, backend="eager", fullgraph=True), torch.randn(3))
        assert _compat_errors.is_user_exception(error)
    error = failure(torch.compile(raises, backend="eager", fullgraph=True), torch.randn(3))
    assert _compat_errors.kind_and_reason(error)[1] == "ValueError('mine')"


def test_backend_errors_are_wrapped() -> None:
    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        raise ValueError("from the backend")

    error = failure(torch.compile(lambda x: x + 1, backend=backend), torch.randn(3))
    inner = _compat_errors.backend_error(error)
    assert isinstance(inner, ValueError)
    assert _compat_errors.while_capturing(error)


def test_too_many_captures_have_a_reason() -> None:
    fn: Any = torch.compile(  # type: ignore[call-overload]
        lambda x, k: x * len(k), backend="eager", fullgraph=True, recompile_limit=1
    )
    error = failure(lambda: [fn(torch.randn(3), "a" * n) for n in (1, 2)])
    assert _compat_errors.over_limit(error)
    assert _compat_errors.while_capturing(error)
    assert "k" in (_compat_errors.recompile_reason(error) or "")
    assert not _compat_errors.over_limit(RuntimeError())


def test_errors_that_arise_elsewhere_are_not_of_a_capture() -> None:
    assert not _compat_errors.while_capturing(failure(torch.mm, torch.ones(2), torch.ones(2)))
    assert issubclass(
        type(failure(torch.linalg.inv, torch.zeros(2, 2))), _compat_errors.LinAlgError
    )
    assert issubclass(_compat_errors.RestartAnalysis, RuntimeError)
    assert issubclass(_compat_errors.GuardOnDataDependentSymNode, RuntimeError)


def test_sizes_that_are_values_of_a_tensor() -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        gm, _ = capture(lambda x: (x * 2, x.nonzero().sum(0)), torch.randn(3))
    told = {n.target: _compat_errors.sized_by_data(n) for n in gm.graph.nodes}
    assert told["nonzero"] and told["sum"]
    assert not told[operator.mul]


def test_a_checkpoint_stops_its_second_run_by_an_exception() -> None:
    caught = []

    def fn(x: torch.Tensor) -> torch.Tensor:
        try:
            return x.sin().cos()
        except _compat_errors.StopRecomputation as stop:
            caught.append(stop)
            raise

    x = torch.ones(2, requires_grad=True)
    torch.utils.checkpoint.checkpoint(fn, x, use_reentrant=False).sum().backward()
    assert len(caught) == 1


def test_a_collective_that_failed_is_told_from_other_errors() -> None:
    """Of gloo by the file that its text names; see also tests/distributed/test_faults.py."""
    gloo = "[/x/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"
    assert _compat_errors.from_collective(RuntimeError(gloo))
    assert _compat_errors.from_collective(torch.distributed.DistNetworkError("closed"))
    assert not _compat_errors.from_collective(RuntimeError("mat1 and mat2 shapes"))
    assert not _compat_errors.from_collective(ValueError(gloo))
