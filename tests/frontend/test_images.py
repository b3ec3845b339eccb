"""Images of any size: the patches of one are no multiple of its width, so batches are cut."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from double import largest_difference
from torch import Tensor, nn

import fxmem
from fxmem import Plan, Stream

D, PATCH, WINDOW = 8, 4, 3


class Patches(nn.Module):
    """Images ``[N, 3, H, W]`` to classes."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, D, PATCH, PATCH)
        self.first = nn.Parameter(torch.randn(1, 1, D))
        self.norm, self.mix, self.head = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, 3)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.project(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1)
        q, k, v = self.mix(self.norm(x)).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v)
        scores = self.head(x[:, 0] + x[:, 1:].mean(1))
        return scores.square().mean() if labels is None else F.cross_entropy(scores, labels)


class Windows(nn.Module):
    """Windows of a picture, padded to whole ones, shifted, and merged by pairs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, D, PATCH, PATCH)
        self.mixes = nn.ModuleList(nn.Linear(D, D) for _ in range(3))
        self.merges = nn.ModuleList(nn.Linear(4 * D, D) for _ in range(2))
        self.head = nn.Linear(D, 3)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x = self.project(images).permute(0, 2, 3, 1)
        for i, mix in enumerate(self.mixes):
            n, height, width, d = x.shape
            x = F.pad(x, (0, 0, 0, -width % WINDOW, 0, -height % WINDOW)).roll(1, 1)
            down, along = x.shape[1] // WINDOW, x.shape[2] // WINDOW
            w = x.view(n, down, WINDOW, along, WINDOW, d).transpose(2, 3).reshape(-1, WINDOW**2, d)
            w = (w + F.scaled_dot_product_attention(mix(w), w, w)).view(-1, WINDOW, WINDOW, d)
            count = w.shape[0] // (x.shape[1] * x.shape[2] // WINDOW**2)
            w = w.view(count, down, along, WINDOW, WINDOW, d).transpose(2, 3)
            x = w.reshape(count, *x.shape[1:]).roll(-1, 1)[:, :height, :width]
            if i < 2:
                x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
                pairs = [x[:, a::2, b::2] for a in (0, 1) for b in (0, 1)]
                x = self.merges[i](torch.cat(pairs, -1))
        return F.cross_entropy(self.head(x.mean((1, 2))), labels)


def batches(*sizes: tuple[int, int, int]) -> Iterator[tuple[Tensor, Tensor]]:
    for count, height, width in sizes:
        yield torch.randn(count, 3, height, width, dtype=torch.float64), torch.arange(count) % 3


def same(net: nn.Module, plain: nn.Module, given: Sequence[Tensor]) -> None:
    found = []
    for one in (plain, net):
        one.zero_grad()
        loss = one(*given)
        loss.backward()
        found.append({"loss": loss.detach(), **{n: p.grad for n, p in one.named_parameters()}})
    assert largest_difference(found[1], found[0])[0] <= 1e-10


@pytest.mark.parametrize("labelled", [True, False])
def test_images_are_cut_along_the_batch(labelled: bool) -> None:
    torch.manual_seed(0)
    plain = Patches().double()
    net = copy.deepcopy(plain)
    fxmem.transform(net, Plan(stream=Stream(chunk=2, loss_chunk=2)))
    for images, labels in batches((5, 16, 16), (3, 12, 20), (4, 24, 12)):
        same(net, plain, (images, labels) if labelled else (images,))
    report = fxmem.explain(net)
    assert not report.barriers and not report.pieces
    assert report.executed_bodies > len(report.regions)


def test_windows_of_a_picture_take_no_minutes() -> None:
    torch.manual_seed(0)
    plain = Windows().double()
    net = copy.deepcopy(plain)
    fxmem.transform(net, Plan(stream=Stream(chunk=2, loss_chunk=2)))
    for given in batches((5, 44, 52), (3, 60, 28)):
        same(net, plain, given)
    assert not fxmem.explain(net).pieces
