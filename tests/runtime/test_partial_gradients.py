"""Backwards of parts of a model: some inputs, some outputs, several passes over one graph."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import twins
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxmem

OUTPUTS = ("loss", "aux", "hidden", "pooled")
PARAMETERS = [name for name, _ in twins.Net().named_parameters()]


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    return twins.pair()


def target(outputs: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    return sum(outputs[k].square().sum() * w for k, w in weights.items())  # type: ignore[return-value]


def run(net: nn.Module, ids: Tensor, passes: list[tuple[str, dict[str, float], list[str]]]) -> Any:
    """Gradients after each pass over one graph."""
    net.zero_grad()
    outputs, found = net(ids), []
    parameters = dict(net.named_parameters())
    for i, (how, weights, names) in enumerate(passes):
        wanted = [parameters[n] for n in names]
        keep = i < len(passes) - 1
        loss = target(outputs, weights)
        if how == "grad":
            found += torch.autograd.grad(loss, wanted, retain_graph=keep, allow_unused=True)
        else:
            given = {"inputs": wanted} if how == "inputs" else {}
            loss.backward(retain_graph=keep, **given)
        found += [None if p.grad is None else p.grad.clone() for p in parameters.values()]
    return found


PASSES = st.lists(
    st.tuples(
        st.sampled_from(["grad", "inputs", "all"]),
        st.dictionaries(st.sampled_from(OUTPUTS), st.sampled_from([1.0, -0.5]), min_size=1),
        st.lists(st.sampled_from(PARAMETERS), min_size=1, max_size=3, unique=True),
    ),
    min_size=1, max_size=3,
)  # fmt: skip


@settings(max_examples=15)
@given(passes=PASSES, length=st.sampled_from([9, 13]))
def test_any_sequence_of_partial_backwards(
    models: tuple[nn.Module, nn.Module], passes: Any, length: int
) -> None:
    ids = twins.ids(2, length)
    want, got = (run(net, ids, passes) for net in models)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        twins.same(a, b, f"{i} of {passes}")


@pytest.mark.parametrize("used", OUTPUTS)
def test_parameters_that_feed_unused_outputs_get_none(models: Any, used: str) -> None:
    for net in models:
        net.zero_grad()
        target(net(twins.ids()), {used: 1.0}).backward()
    twins.same_gradients(models[1], models[0])
    assert any(p.grad is None for p in models[1].parameters())


def test_an_unused_output_with_an_infinite_derivative() -> None:
    """Zeros in place of its gradient would give zero times infinity."""

    class Root(twins.Net):
        def forward(self, ids: Tensor) -> dict[str, Tensor]:
            out = super().forward(ids)
            return out | {"root": (out["hidden"] - out["hidden"].detach()).abs().sqrt()}

    plain, net = twins.pair(Root())
    for module in (plain, net):
        module(twins.ids())["loss"].backward()
    twins.same_gradients(net, plain)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("retain", [False, True])
def test_gradients_that_are_one_tensor(models: Any, scale: float, retain: bool) -> None:
    """`w + shift.t()` and two scalars that are added: scaled once, and apart when added to."""
    for net in models:
        net.zero_grad()
        loss = net(twins.ids())["loss"] * scale
        loss.backward(retain_graph=retain)
        if retain:
            loss.backward()
        net(twins.ids(seed=1))["loss"].backward()
    twins.same_gradients(models[1], models[0])


def test_an_exception_in_a_backward_leaves_no_part(models: Any) -> None:
    for net in models:
        net.zero_grad()
        loss = net(twins.ids())["loss"]
        handle = net.layers[0].mix.weight.register_hook(lambda g: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss.backward(retain_graph=True)
        handle.remove()
        net.zero_grad()
        loss.backward()
    twins.same_gradients(models[1], models[0])


def test_a_backward_within_a_backward(models: Any) -> None:
    for net in models:
        net.zero_grad()
        loss = net(twins.ids())["loss"]

        def inner(grad: Tensor, loss: Tensor = loss, net: Any = net) -> Tensor:
            (own,) = torch.autograd.grad(loss, [net.embed.weight], retain_graph=True)
            return grad + own.sum()

        handle = net.layers[1].mix.weight.register_hook(inner)
        loss.backward(retain_graph=True)
        handle.remove()
        loss.backward()
    twins.same_gradients(models[1], models[0])


def test_interleaved_graphs_and_threads(models: Any) -> None:
    for net in models:
        net.zero_grad()
        losses = [net(twins.ids(2, t, seed=t))["loss"] for t in (13, 9)]
        torch.autograd.grad(losses[0], [net.norm.weight], retain_graph=True)
        thread = threading.Thread(target=losses[1].backward)
        thread.start()
        thread.join()
        losses[0].backward()
    twins.same_gradients(models[1], models[0])


def test_parameters_may_change_between_passes(models: Any) -> None:
    """The second pass over a graph is refused before it has added to any gradient."""
    net = models[1]
    net.zero_grad()
    loss = net(twins.ids())["loss"]
    loss.backward(retain_graph=True)
    before = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    weight = net.layers[0].mix.weight
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(fxmem.ModifiedParameterError, match=r"layers\[?.?0.*mix\.weight"):
        loss.backward()
    with torch.no_grad():
        weight.div_(2)
    for p, grad in zip(net.parameters(), before, strict=True):
        twins.same(p.grad, grad)


def test_the_users_gradient_is_not_written_to(models: Any) -> None:
    """A region that hands a gradient on may write over it, but never over one that was given."""
    for net in models:
        net.zero_grad()
        hidden = net(twins.ids())["hidden"]
        for _ in range(3):
            given = torch.arange(hidden.numel()).view_as(hidden).to(hidden)
            kept = given.clone()
            hidden.backward(given, retain_graph=True)
            assert torch.equal(given, kept)
    twins.same_gradients(models[1], models[0])
