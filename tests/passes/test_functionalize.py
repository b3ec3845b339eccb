"""Writes in place inside the captured graph: values and gradients are those of plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxmem
from fxmem import MutationError, Plan, Stream
from fxmem._compat import graph as _compat
from fxmem.passes.functionalize import Functionalize, writes
from fxmem.rewriting.pipeline import run_passes

D = 8


def arithmetic(x: Tensor, w: Tensor) -> Tensor:
    y = x + w
    y += w
    y.mul_(2).sub_(1)
    y /= 3
    return y


def through_a_slice(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    y[:, 0] = 0
    y[:, 1:3] += w
    y[..., 2:5] = y[..., 3:6] * 2
    return y


def through_nested_views(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    view = y.view(y.shape[0], y.shape[1], 2, D // 2).transpose(-1, -2)
    part = view[..., 1]
    part.mul_(3)
    again = view + 1  # read after the write
    y.add_(1)
    return again.flatten(2) * y + part.sum(-1, keepdim=True)


def halves(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    a, b = y[..., : D // 2], y[..., D // 2 :]
    a += 2 * b
    b.copy_(a + 1)
    return y.sin() + torch.cat([b, a], -1)


def indexed(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    y[y > 0] = 0.5
    y.masked_fill_(y < -1, 0.25)
    y[:, torch.tensor([0, 2])] = w
    y.index_fill_(-1, torch.tensor([1]), 3.0)
    return y


def functions(x: Tensor, w: Tensor) -> Tensor:
    y = F.relu(x * w, inplace=True)
    z = F.silu(y + 1, True)
    torch.sigmoid_(z)
    return F.leaky_relu_(z - 0.5) + y


def filled(x: Tensor, w: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[..., ::2] = (x * w)[..., ::2]
    z = torch.empty_like(x).fill_(2.0)
    z.zero_().add_(y)
    return z + y


def keeps_its_dtype(x: Tensor, w: Tensor) -> Tensor:
    y = (x * w).bfloat16()
    y += w
    y.add_(w)
    return y.float()


def mask_without_parameters(x: Tensor, w: Tensor) -> Tensor:
    weights = torch.ones(x.shape[1])
    weights[0] = 0
    weights[2:] *= 0.5
    return x * w * weights.unsqueeze(-1)


def writes_out(x: Tensor, w: Tensor) -> Tensor:
    y = x.detach() * 2
    torch.mul(x.detach(), 3, out=y)
    eye = torch.eye(D, out=torch.empty(D, D, dtype=torch.float64))
    return y + x * w @ eye.to(w.dtype)


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    f.__name__: f
    for f in (
        arithmetic, through_a_slice, through_nested_views, halves, indexed, functions, filled,
        writes_out, keeps_its_dtype, mask_without_parameters,
    )
}  # fmt: skip


def captured(fn: Any, *args: Tensor) -> tuple[fx.GraphModule, list[Any]]:
    seen: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        result = run_passes((Functionalize(),), gm)
        assert not any(writes(n) for n in result.graph.nodes)
        seen.append((result, list(example_inputs)))
        return result.forward

    torch._dynamo.reset()
    fn = torch.compile(fn, backend=backend, fullgraph=True)
    fn(*args)
    return seen[0]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_rewritten_function_is_the_same_function(name: str) -> None:
    fn = FUNCTIONS[name]
    x, w = torch.randn(2, 5, D), torch.randn(D, requires_grad=True)
    want = fn(x, w)
    (wanted,) = torch.autograd.grad(want.square().sum(), w)
    gm, inputs = captured(fn, x, w)
    (got,) = gm(*inputs)
    (grad,) = torch.autograd.grad(got.square().sum(), w)
    assert torch.equal(got, want)
    torch.testing.assert_close(grad, wanted, rtol=1e-6, atol=1e-6)


class Net(nn.Module):
    def __init__(self, fn: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(11, D), nn.Linear(D, D)
        self.scale, self.head = nn.Parameter(torch.randn(D)), nn.Linear(D, 11)
        self.register_buffer("seen", torch.zeros(1))
        self.fn = fn

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        q = self.mix(x).unsqueeze(1)
        x = x + F.scaled_dot_product_attention(q, q, q, is_causal=True).squeeze(1)
        x = self.fn(x, self.scale)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def gradients(net: nn.Module, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    net.zero_grad()
    loss = net(ids, ids)
    loss.backward()
    return loss.detach(), [p.grad for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n != "keeps_its_dtype"])
@pytest.mark.filterwarnings("ignore::fxmem.FxmemWarning")
def test_streamed_with_writes(name: str) -> None:
    net, ids = Net(FUNCTIONS[name]).double(), torch.randint(11, (2, 13))
    loss, want = gradients(net, ids)
    fxmem.transform(net, Plan(stream=Stream(chunk=4, loss_chunk=4)))
    got_loss, got = gradients(net, ids)
    assert fxmem.explain(net).executed_bodies
    torch.testing.assert_close(got_loss, loss, rtol=1e-12, atol=0)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_arithmetic_streams_without_a_barrier() -> None:
    net, ids = Net(arithmetic), torch.randint(11, (2, 13))
    fxmem.transform(net, Plan(stream=Stream(chunk=4, loss_chunk=4)))
    gradients(net, ids)
    assert fxmem.explain(net).barriers == []


def writes_input(x: Tensor, w: Tensor) -> Tensor:
    return x.mul_(2) * w


def writes_view_of_input(x: Tensor, w: Tensor) -> Tensor:
    x.view(-1)[0] = 1
    return x * w


def behind_autograd(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    with torch.no_grad():
        y.mul_(2)
    return y + w


REFUSED = {
    "mul_": (writes_input, "to the input or buffer `x`"),
    "setitem": (writes_view_of_input, "to the input or buffer `x`"),
}


@pytest.mark.parametrize("op", REFUSED)
def test_what_is_refused_says_why(op: str) -> None:
    fn, reason = REFUSED[op]
    engine = fxmem.backend()
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend=engine, fullgraph=True)
    x, w = torch.randn(2, 5, D), torch.randn(D, requires_grad=True)
    before = x.clone()
    with pytest.raises(MutationError, match=reason) as caught:
        compiled(x, w)
    assert caught.value.op == op
    assert "test_functionalize.py" in (caught.value.source or "")
    assert torch.equal(x, before)


def test_a_write_behind_autograds_back_is_refused() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(behind_autograd, backend=fxmem.backend(), fullgraph=True)
    with pytest.raises(MutationError, match="behind autograd"):
        compiled(torch.randn(2, 5, D), torch.randn(D, requires_grad=True))


def test_names_of_inputs() -> None:
    gm, _ = captured(arithmetic, torch.randn(2, 3, D), torch.randn(D, requires_grad=True))
    names = [_compat.input_name(n) for n in gm.graph.find_nodes(op="placeholder")]
    assert names == ["x", "w"]
