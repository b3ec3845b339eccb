"""Layers that are alike are traced once; what is not alike, or changes later, is traced anew."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmem
from fxmem import Plan, Stream, api
from fxmem._compat.repeated_layers import AVAILABLE, Sharing

DEPTH, WIDTH = 5, 8
pytestmark = pytest.mark.skipif(not AVAILABLE, reason="PyTorch before 2.13 traces every layer")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down, self.scale = nn.Linear(2 * WIDTH, WIDTH), 1.0
        self.act = nn.Tanh()  # nothing below it is an input of the graph
        self.in_place, self.extra = False, None

    def forward(self, x: Tensor, positions: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        h = self.norm(x) * rotary[0] + rotary[1] * positions.unsqueeze(-1)
        if self.in_place:
            h = h.contiguous()
            h += 1
        y = x + self.down(self.act(self.up(h))) * self.scale
        return y if self.extra is None else y * self.extra


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, 11)
        self.split = DEPTH

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        positions = torch.arange(ids.shape[1]).expand_as(ids).to(x.dtype)
        rotary = (positions.cos().unsqueeze(-1), positions.sin().unsqueeze(-1))
        for layer in self.layers[: self.split]:
            x = layer(x, positions, rotary=rotary)
        with torch.no_grad():
            for layer in self.layers[self.split :]:
                x = x + layer(x, positions, rotary=rotary)
        logits = self.head(x)
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Sharing]:
    """What shares traces, of every model that is transformed."""
    made: list[Sharing] = []

    def noted(*args: Any) -> Sharing:
        made.append(Sharing(*args))
        return made[-1]

    monkeypatch.setattr(api, "Sharing", noted)
    return made


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def streamed(model: Net) -> Net:
    result: Any = fxmem.transform(model, Plan(stream=Stream(chunk=4)))
    return result


def check(model: nn.Module, plain: nn.Module) -> None:
    """Loss and every gradient are those of the plain model."""
    ids = torch.randint(0, 11, (2, 9))
    got, want = model(ids), plain(ids)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    for m, loss in ((model, got), (plain, want)):
        m.zero_grad()
        loss.backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10, msg=name)


def test_one_trace_for_all(seen: list[Sharing]) -> None:
    plain = net()
    model = streamed(copy.deepcopy(plain))
    check(model, plain)
    assert (seen[-1].traced, seen[-1].stamped) == (1, DEPTH - 1)
    names = [r.modules for r in api._TRANSFORMED[model].graphs[-1].calls]
    assert any("layers.3" in name for name in names), names


def other_number(model: Net) -> None:
    model.layers[3].scale = 0.5


def frozen(model: Net) -> None:
    model.layers[2].up.requires_grad_(False)


def hooked(model: Net) -> None:
    model.layers[3].up.register_forward_hook(lambda module, args, out: out * 2)


def tied(model: Net) -> None:
    model.layers[0].up.weight = model.layers[4].up.weight


def writing(model: Net) -> None:
    for layer in model.layers:
        layer.in_place = True


def a_tensor_of_its_own(model: Net) -> None:
    model.layers[1].extra = torch.tensor(3.0, dtype=torch.float64)


def half_without_gradients(model: Net) -> None:
    model.split = 3


def of_another_class(model: Net) -> None:
    class Doubled(Layer):
        def forward(self, x: Tensor, positions: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
            return 2 * super().forward(x, positions, rotary)

    model.layers[2].__class__ = Doubled


def another_activation(model: Net) -> None:
    model.layers[4].act = nn.Sigmoid()


def an_activation_of_another_kind(model: Net) -> None:
    model.layers[4].act.__class__ = nn.Sigmoid


def a_method_of_its_own(model: Net) -> None:
    act = model.layers[1].act
    act.forward = lambda x: x.sin()


def another_epsilon(model: Net) -> None:
    model.layers[3].norm.eps = 0.5


KINDS: dict[Callable[[Net], None], int] = {
    other_number: 2, frozen: 1, hooked: 1, tied: 1, writing: 1, a_tensor_of_its_own: 1,
    half_without_gradients: 3, of_another_class: 1,
}  # fmt: skip
"""Changes of a model, and how many of its layers are traced to be shared."""


@pytest.mark.parametrize("change", KINDS, ids=lambda f: f.__name__)
def test_layers_that_differ(change: Callable[[Net], None], seen: list[Sharing]) -> None:
    plain = net()
    change(plain)
    model = streamed(copy.deepcopy(plain))
    check(model, plain)
    assert seen[-1].traced == KINDS[change]
    assert seen[-1].stamped > 0


@pytest.mark.parametrize(
    "change", [
        other_number, frozen, hooked, a_tensor_of_its_own, of_another_class, another_activation,
        an_activation_of_another_kind, a_method_of_its_own, another_epsilon,
    ], ids=lambda f: f.__name__,
)  # fmt: skip
def test_a_layer_that_changes_after_its_capture(change: Callable[[Net], None]) -> None:
    """Guards of layers that were not traced are as good as those of the one that was."""
    plain = net()
    model = streamed(copy.deepcopy(plain))
    check(model, plain)
    change(model)
    change(plain)
    check(model, plain)


class Pair(Layer):
    """Its second result is no tensor, so that its trace is of use to no other layer."""

    def forward(self, x: Tensor, positions: Tensor, rotary: tuple[Tensor, Tensor]) -> Any:
        return super().forward(x, positions, rotary), None


class Watched(Layer):
    """A hook on a gradient has no place in a subgraph."""

    def forward(self, x: Tensor, positions: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        h = torch.tanh(x)
        if h.requires_grad:
            h.register_hook(lambda grad: grad * 2)
        return x + super().forward(h, positions, rotary)


class First(Net):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        positions = torch.arange(ids.shape[1]).expand_as(ids).to(x.dtype)
        rotary = (positions.cos().unsqueeze(-1), positions.sin().unsqueeze(-1))
        for layer in self.layers:
            x = layer(x, positions, rotary)[0]
        return self.head(x).square().mean()


@pytest.mark.parametrize("cls", [Pair, Watched], ids=lambda c: c.__name__)
def test_what_cannot_be_shared_is_traced_in_its_place(cls: type, seen: list[Sharing]) -> None:
    plain = net()
    for layer in plain.layers:
        layer.__class__ = cls
    if cls is Pair:
        plain.__class__ = First
    model = streamed(copy.deepcopy(plain))
    check(model, plain)
    assert (seen[-1].traced, seen[-1].stamped) == (1, 0)
    assert seen[-1].refused == (cls is Watched)


def test_layers_that_all_differ_in_a_number_are_not_compared_for_ever(seen: list[Sharing]) -> None:
    plain = net()
    plain.layers.extend(Layer().double() for _ in range(4))
    plain.split = len(plain.layers)
    for i, layer in enumerate(plain.layers):
        layer.scale = 1 + i / 10
    model = streamed(copy.deepcopy(plain))
    check(model, plain)
    assert seen[-1].traced < len(plain.layers)
