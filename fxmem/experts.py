"""Mixture-of-experts blocks of transformers, through the registry that it dispatches them by.

While a model is captured its experts run :func:`streamed_experts`, which is made of per-row ops;
the activation and the gate stay the model's own. No model is named here: any block that
transformers dispatches through its experts interface works, and its setting is put back after the
call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fxmem.kernels.expert_linear import expert_linear

NAME = "fxmem"


def streamed_experts(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """``hidden_states [N, d]``, choices and weights ``[N, k]`` -> ``[N, d]``."""
    k = top_k_index.shape[-1]
    index = top_k_index.reshape(-1)
    rows = hidden_states.unsqueeze(1).expand(-1, k, -1).reshape(-1, hidden_states.shape[-1])
    up = "gate_up_proj" if self.has_gate else "up_proj"
    rows = _linear(self, rows, up, index)
    rows = self._apply_gate(rows) if self.has_gate else self.act_fn(rows)
    rows = _linear(self, rows, "down_proj", index)
    if getattr(self, "has_post_expert_norm", False):
        rows = self.post_expert_norm(rows)
    rows = rows * top_k_weights.reshape(-1).unsqueeze(-1)
    out = rows.reshape(-1, k, rows.shape[-1]).sum(dim=1)
    return out.to(hidden_states.dtype)


def _linear(self: Any, x: Tensor, name: str, index: Tensor) -> Tensor:
    weight = getattr(self, name)
    out = expert_linear(x, weight.transpose(1, 2) if self.is_transposed else weight, index)
    return out + F.embedding(index, getattr(self, name + "_bias")) if self.has_bias else out


@contextlib.contextmanager
def streamable(model: nn.Module) -> Iterator[None]:
    """Dispatch the expert blocks of ``model`` to :func:`streamed_experts` inside the context."""
    configs = {
        id(c): c
        for m in model.modules()
        if (c := getattr(m, "config", None)) is not None and hasattr(c, "_experts_implementation")
        and hasattr(m, "_apply_gate")
    }  # fmt: skip
    if not configs:
        yield
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, streamed_experts)
    before = {key: c._experts_implementation for key, c in configs.items()}
    for c in configs.values():
        c._experts_implementation = NAME
    try:
        yield
    finally:
        for key, c in configs.items():
            c._experts_implementation = before[key]
