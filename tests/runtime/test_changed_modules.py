"""Modules and functions that change between steps take effect, as in plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import twins
from torch import Tensor, nn
from twins import agree, some, step


def new_module(net: Any) -> None:
    net.norm = nn.LayerNorm(twins.D, eps=0.1).double()


def swapped_modules(net: Any) -> None:
    net.layers[0], net.layers[1] = net.layers[1], net.layers[0]


def one_layer_more(net: Any) -> None:
    net.layers.append(copy.deepcopy(net.layers[0]))


def numbers(net: Any) -> None:
    net.layers[0].scale, net.norm.eps, net.layers[1].drop.p = 2.0, 0.5, 1.0


def evaluation_of_one_module(net: Any) -> None:
    net.layers[0].drop.p = net.layers[1].drop.p = 1.0
    step(net)
    net.layers[0].eval()


def another_forward(net: Any) -> None:
    plain = net.layers[0].forward
    net.layers[0].forward = lambda x: plain(x) * 2


def another_class(net: Any) -> None:
    class Doubled(twins.Layer):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    net.layers[0].__class__ = Doubled


def tied_and_replaced_parameters(net: Any) -> None:
    net.layers[1].mix.weight = net.layers[0].mix.weight
    net.layers[1].up = net.layers[0].up
    net.norm.weight = nn.Parameter(torch.ones(twins.D).double() * 2)
    net.layers[0].down.weight.data = net.layers[0].down.weight.data * 2


def untied_parameters(net: Any) -> None:
    own, net.layers[1].mix.weight = net.layers[1].mix.weight, net.layers[0].mix.weight
    step(net)
    net.layers[1].mix.weight = own


def frozen_parameters(net: Any) -> None:
    net.embed.weight.requires_grad_(False)
    net.layers[1].up.requires_grad_(False)


def parametrized(net: Any) -> None:
    nn.utils.parametrizations.weight_norm(net.layers[0].mix)


@some(
    [tied_and_replaced_parameters],
    [
        new_module, swapped_modules, one_layer_more, numbers, evaluation_of_one_module,
        another_forward, another_class, untied_parameters, frozen_parameters, parametrized,
    ],
)  # fmt: skip
def test_changed_modules_take_effect(change: Callable[[Any], None]) -> None:
    models = twins.pair()
    agree(models)
    for net in models:
        change(net)
    agree(models)


def test_functions_that_are_replaced_take_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    models = twins.pair()
    agree(models)
    forward = twins.Layer.forward
    monkeypatch.setattr(twins.Layer, "forward", lambda self, x: forward(self, x) * 2)
    agree(models)
    monkeypatch.setattr(F, "silu", lambda x: x * 2)
    agree(models)
    monkeypatch.setattr(forward, "__code__", (lambda self, x: x * 2).__code__)
    agree(models)
