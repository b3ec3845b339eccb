"""Losses outside a model that is trained block by block: the weights of plain logits, streamed."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import tiny
import torch
from double import everything_in_double, largest_difference
from outside_losses import LOSSES, batch
from torch import Tensor, nn

import fxmem
from fxmem import SGD, BlockAdamW, Blocks, LowRank, Plan, Stream

CASES: dict[str, dict[str, Any]] = {
    "sgd": {"inactive": SGD(lr=0.05)},
    "sgd of all, accumulated": {
        "inactive": SGD(lr=0.05), "reach": "all", "accumulation": "accumulate",
    },
    "low rank": {"inactive": LowRank(rank=2, lr=0.05)},
    "frozen": {},
}  # fmt: skip


def trained(model: nn.Module, logits: Any, name: str) -> dict[str, Tensor]:
    """Weights and losses of four steps, two visits."""
    net = copy.deepcopy(model)
    blocks = Blocks(steps=2, **CASES[name])
    fxmem.transform(net, Plan(stream=Stream(chunk=7, loss_chunk=5, logits=logits), blocks=blocks))
    optimizer = BlockAdamW(net, lr=1e-2)
    found = {}
    for step in range(4):
        for part in range(1 + ("accumulated" in name)):
            data = batch(23 + part)
            kept = net(input_ids=data["ids"], use_cache=False).logits
            loss = LOSSES["dpo" if step % 2 else "cross_entropy"](kept, data)
            right = (kept.argmax(-1) == data["ids"]).double().mean()
            loss.backward()
            found[f"loss {step} {part}"], found[f"right {step} {part}"] = loss.detach(), right
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            found[f"evaluated {step}"] = LOSSES["cross_entropy"](
                net(input_ids=data["ids"]).logits, data
            )
    if logits == "drop":
        programs = fxmem.api._TRANSFORMED[net].recorder.programs.values()
        assert all(p.backend.graphs for p in programs)
        assert any(p.backend.graphs[0].selected for p in programs)
    return {**{n: p.detach() for n, p in net.named_parameters()},
            **{k: torch.as_tensor(float(v)) for k, v in found.items()}}  # fmt: skip


@pytest.mark.parametrize(
    "name", [n if n == "sgd" else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_weights_after_four_steps(name: str) -> None:
    with everything_in_double(), warnings.catch_warnings():
        warnings.simplefilter("error", fxmem.FxmemWarning)
        model = tiny.model("llama", tie_word_embeddings=name == "sgd").double()
        want = trained(model, "keep", name)
        got = trained(model, "drop", name)
    assert largest_difference(got, want)[0] <= 1e-10
