"""A small module that gives a loss: exact, with nothing that runs whole."""

from __future__ import annotations

import copy

import torch
from double import largest_difference
from torch import nn

import fxmem
from fxmem import Plan, Stream


def streams(plain: nn.Module, vocab: int, chunk: int) -> None:
    """It is exact, and nothing runs whole."""
    assert not fxmem.explain(exact(plain, vocab, chunk)).barriers


def exact(plain: nn.Module, vocab: int, chunk: int) -> nn.Module:
    """``plain(ids)`` in float64 has the loss and gradients of its streamed copy, at two lengths;
    the copy.
    """
    net = copy.deepcopy(plain.double())
    fxmem.transform(net, Plan(stream=Stream(chunk=chunk, loss_chunk=chunk)))
    for n in (7, 12):
        ids = torch.randint(vocab, (2, n))
        found = []
        for one in (plain, net):
            one.zero_grad()
            loss = one(ids)
            loss.backward()
            found.append({"loss": loss.detach(), **{k: p.grad for k, p in one.named_parameters()}})
        assert largest_difference(found[1], found[0])[0] <= 1e-10
    return net
