"""Images of any size: the patches of one are no multiple of its width, so batches are cut."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from double import largest_difference
from torch import Tensor, nn

import fxmem
from fxmem import Plan, Stream

D, PATCH = 8, 4


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


@pytest.mark.parametrize("labelled", [True, False])
def test_images_are_cut_along_the_batch(labelled: bool) -> None:
    torch.manual_seed(0)
    plain = Patches().double()
    net = copy.deepcopy(plain)
    fxmem.transform(net, Plan(stream=Stream(chunk=2, loss_chunk=2)))
    for count, height, width in ((5, 16, 16), (3, 12, 20), (4, 24, 12)):
        images = torch.randn(count, 3, height, width, dtype=torch.float64)
        given = (images, torch.arange(count) % 3) if labelled else (images,)
        found = []
        for one in (plain, net):
            one.zero_grad()
            loss = one(*given)
            loss.backward()
            found.append({"loss": loss.detach(), **{n: p.grad for n, p in one.named_parameters()}})
        assert largest_difference(found[1], found[0])[0] <= 1e-10
    report = fxmem.explain(net)
    assert not report.barriers and not report.pieces
    assert report.executed_bodies > len(report.regions)
