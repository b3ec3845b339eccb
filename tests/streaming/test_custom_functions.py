"""``torch.autograd.Function`` in a captured graph: its own backward, exact in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from custom_functions import STEPS, Autocast, Clip, Product, Straight
from double import everything_in_double, largest_difference
from hypothesis import given, settings
from torch import Tensor, nn
from torch._higher_order_ops.map import map as mapped
from torch._higher_order_ops.while_loop import while_loop
from torch.utils.checkpoint import checkpoint

import fxmem
from fxmem import Plan, Stream

D, V = 8, 11
Function: Any = torch.autograd.Function
# torch's own: Dynamo makes an instance to stand for the context
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated")


class Net(nn.Module):
    """A layer per name, with attention before it, and a loss; ``tail``: a step behind the loss's
    logits.
    """

    def __init__(self, names: tuple[str, ...], tail: str | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.names, self.tail = names, tail
        self.embed, self.norm = nn.Embedding(V, D), nn.LayerNorm(D)
        self.weights = nn.ParameterList(torch.randn(D, D) * 0.4 for _ in names)
        self.head = nn.Parameter(torch.randn(D, D) * 0.4)
        self.out = nn.Linear(D, V)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for name, w in zip(self.names, self.weights, strict=True):
            q = self.norm(x).unsqueeze(1)
            x = x + F.scaled_dot_product_attention(q, q, q, is_causal=True).squeeze(1)
            x = x + STEPS[name](self.norm(x), w)
        if self.tail is not None:
            x = STEPS[self.tail](x, self.head)
        return F.cross_entropy(self.out(x).flatten(0, 1), ids.flatten())


def gradients(net: nn.Module, ids: Tensor, scale: float = 1.0) -> tuple[Tensor, dict[str, Any]]:
    net.zero_grad()
    loss = net(ids)
    (loss * scale).backward()
    return loss.detach(), {n: p.grad for n, p in net.named_parameters() if p.grad is not None}


def compare(net: nn.Module, chunk: int, lengths: tuple[int, ...] = (13, 9)) -> None:
    torch._dynamo.reset()
    with everything_in_double():
        net = net.double()
        given = [torch.randint(V, (2, t)) for t in lengths]
        want = [gradients(net, ids, 3.0) for ids in given]
        fxmem.transform(net, Plan(stream=Stream(chunk=chunk, loss_chunk=chunk)))
        for ids, (loss, grads) in zip(given, want, strict=True):
            got_loss, got = gradients(net, ids, 3.0)
            torch.testing.assert_close(got_loss, loss, rtol=1e-12, atol=0)
            difference, name = largest_difference(got, grads)
            assert difference <= 1e-10, name
        assert fxmem.explain(net).executed_bodies


NAMES = list(STEPS)


@pytest.mark.parametrize("at", range(0, len(NAMES), 3))
def test_functions_in_layers(at: int) -> None:
    compare(Net((*NAMES[at : at + 3], NAMES[at])), chunk=4)


@pytest.mark.parametrize("name", ["clip", "split"])
def test_a_function_before_the_loss_with_a_scaled_gradient(name: str) -> None:
    compare(Net(("straight",), tail=name), chunk=4)


def test_layers_that_differ_in_a_body_alone() -> None:
    compare(Net(("reverse", "reverse all", "clip", "reverse")), chunk=5)


@settings(max_examples=3)
@given(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3), st.integers(1, 14), st.data())
def test_any_functions(names: list[str], chunk: int, data: Any) -> None:
    compare(Net(tuple(names), data.draw(st.sampled_from([None, *NAMES]))), chunk)


@pytest.mark.slow
@settings(max_examples=40)
@given(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3), st.integers(1, 14), st.data())
def test_many_functions(names: list[str], chunk: int, data: Any) -> None:
    compare(Net(tuple(names), data.draw(st.sampled_from([None, *NAMES]))), chunk)


def parts(ids: Tensor) -> Tensor:
    """Parameter-free values from a function: computed once, before the regions."""
    return Straight.apply(ids.double() / V, 1.0).unsqueeze(-1)


REGION = torch.compiler.nested_compile_region(lambda x, w: torch.sin(x @ w))
TRANSFORMED: dict[str, Callable[[Tensor, nn.Parameter], Tensor]] = {
    "vmap": lambda x, w: torch.vmap(lambda r: torch.vmap(lambda u: (u @ w).sin())(r))(x),
    "vmap over time": lambda x, w: torch.vmap(lambda r: (r @ w).sin(), 1, 1)(x),
    "grad": lambda x, w: torch.func.grad(lambda r: (r @ w).sin().sum())(x),
    "vjp": lambda x, w: torch.func.vjp(lambda r: (r @ w).sin(), x)[1](x.cos())[0],
    "per row": lambda x, w: torch.vmap(torch.func.grad(lambda r: (r @ w).sin().sum()))(x),
    "region": lambda x, w: REGION(x, w) + REGION(REGION(x, w), w),
    "checkpoint": lambda x, w: checkpoint(
        lambda y: Clip.apply(torch.vmap(lambda r: r @ w)(y)), x, use_reentrant=False
    ),
}


@pytest.mark.parametrize("at", range(0, len(TRANSFORMED), 3))
def test_function_transforms_and_nested_regions(at: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(f"{__name__}.STEPS", TRANSFORMED)
    compare(Net(tuple(TRANSFORMED)[at : at + 3]), chunk=4)


def test_a_function_of_inputs_alone() -> None:
    class Scaled(Net):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * (1 + parts(ids).mean())

    compare(Scaled(("straight",)), chunk=4)


class Dirty(Function):
    """Changes its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        x.mul_(2)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return 2 * grad


class InPlace(Function):
    """Changes the gradient that it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.mul_(2)


class Mapped(Function):
    """One that vmap may run."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.clamp(-0.01, 0.01)


def looped(x: Tensor, w: Tensor) -> Tensor:
    start = (torch.tensor(0), x)
    return while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y @ w), start)[1]


REFUSED: dict[str, tuple[Callable[[Tensor, nn.Parameter], Tensor], type[Exception], str]] = {
    "dirty": (lambda x, w: Dirty.apply(x @ w), fxmem.MutationError, "mark_dirty"),
    "gradient": (lambda x, w: InPlace.apply(x @ w), fxmem.MutationError, "mul_"),
    "in vmap": (lambda x, w: torch.vmap(lambda r: r.sin().mul_(2))(x), fxmem.MutationError, "mul_"),
    "jvp": (
        lambda x, w: torch.func.jvp(lambda r: r @ w, (x,), (x,))[1], fxmem.UnsupportedOpError, "jvp"
    ),
    "vmap": (
        lambda x, w: torch.vmap(lambda r: Mapped.apply(r @ w))(x), fxmem.UnsupportedOpError,
        "`Mapped` under a function transform",
    ),
    "while": (looped, fxmem.UnsupportedOpError, "higher-order op `while_loop`"),
    "map": (lambda x, w: mapped(lambda r: r @ w, x), fxmem.UnsupportedOpError, "`map_impl`"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, monkeypatch: Any) -> None:
    fn, error, message = REFUSED[name]
    monkeypatch.setattr(f"{__name__}.STEPS", {"it": fn})
    torch._dynamo.reset()
    net = fxmem.transform(Net(("it",)), Plan(stream=Stream(chunk=4, loss_chunk=4)))
    with pytest.raises(error, match=message) as caught:
        net(torch.randint(V, (2, 9)))
    assert "test_custom_functions.py" in str(caught.value)


class Mixed(nn.Module):
    """A part in full precision and a function of its own, whatever autocast is around it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.out = nn.Embedding(V, D), nn.LayerNorm(D), nn.Linear(D, V)
        self.weights = nn.ParameterList(torch.randn(D, D) * 0.4 for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for w in self.weights:
            q = self.norm(x).unsqueeze(1)
            x = x + F.scaled_dot_product_attention(q, q, q, is_causal=True).squeeze(1)
            x = x + Autocast.apply(self.norm(x), w)
            with torch.autocast("cpu", enabled=False):
                x = x + Product.apply(x, w, None) @ w
        return F.cross_entropy(self.out(x).float().flatten(0, 1), ids.flatten())


def test_full_precision_inside_autocast() -> None:
    torch._dynamo.reset()
    net, ids = Mixed(), torch.randint(V, (2, 9))
    found = []
    for _ in range(2):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(ids)
        loss.backward()
        found.append({n: p.grad for n, p in net.named_parameters()})
        # one chunk: sums in bfloat16 keep their order
        fxmem.transform(net, Plan(stream=Stream(chunk=9, loss_chunk=9)))
    assert largest_difference(found[1], found[0])[0] < 1e-5
