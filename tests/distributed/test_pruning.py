"""Pruning beside other ranks: the same masks and gradients, and the bare model only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prune_cases import build, coupled
from ranks import on_ranks
from sparse_cases import OPTIONS, RATIOS, batch, drawn, gradients, in_groups, searched

import fxmem


@pytest.mark.distributed
def test_groups_and_wrappers() -> None:
    alone = [searched(estimator) for estimator in OPTIONS]
    model: Any = build("llama")
    units, losses = coupled("llama"), []
    for k, mask in enumerate(drawn(units, ("kv_groups", "mlp_channels"))):
        given = {name: v[:, : 9 - 4 * (k % 2)] for name, v in batch().items()}
        ratio = RATIOS[k] / len(RATIOS)
        losses.append(fxmem.sparse_backward(model, [mask], given, ratios=[ratio], coupled=units))
    for found, loss, grads, messages in on_ranks(in_groups, double=False):
        assert found == [*alone, alone[0]]
        assert abs(loss - sum(losses)) < 1e-12
        for name, grad in gradients(model).items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-12, atol=1e-12)
        assert all(".module" in m for m in messages[:6]), messages
        assert all("part of parameter" in m for m in messages[6:]), messages
