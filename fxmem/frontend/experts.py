"""Mixture-of-experts blocks of transformers, through the registry that it dispatches them by.

While a model is captured its experts run :func:`streamed_experts`, which is made of per-row ops;
the activation and the gate stay the model's own. No model is named here: any block that
transformers dispatches through its experts interface works, and its setting is put back after the
call.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fxmem.errors import FxmemWarning
from fxmem.kernels.expert_linear import expert_linear

NAME, CHECKED = "fxmem", "fxmem_checked"
ALIGNED = 8
"""Elements that a row of grouped products is a multiple of: 16 bytes in bfloat16."""
Watch = Callable[[Tensor, Tensor, Tensor], None]
_WATCHERS: list[Watch] = []


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
    for watch in _WATCHERS:
        watch(weight, x, index)
    out = expert_linear(x, weight.transpose(1, 2) if self.is_transposed else weight, index)
    return out + F.embedding(index, getattr(self, name + "_bias")) if self.has_bias else out


def checked_experts(self: Any, *args: Tensor) -> Tensor:
    """:func:`streamed_experts` of a module whose count of experts is that of its weights.

    transformers' grouped products size their offsets by that count, and fail or read beyond the
    weights where it is another.

    Raises:
        ValueError: it is another.
    """
    count = len(getattr(self, "gate_up_proj" if self.has_gate else "up_proj"))
    if self.num_experts != count:
        raise ValueError(f"num_experts is {self.num_experts}, the weights have {count}")
    return streamed_experts(self, *args)


@contextlib.contextmanager
def streamable(model: nn.Module, implementation: str = NAME) -> Iterator[None]:
    """Dispatch the expert blocks of ``model`` to :func:`streamed_experts` inside the context.

    ``implementation``: another name in transformers' registry, "eager" for the model's own code.
    """
    configs = expert_configs(model)
    if not configs:
        yield
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, streamed_experts)
    ALL_EXPERTS_FUNCTIONS.register(CHECKED, checked_experts)
    before = [(c, c._experts_implementation) for c in configs]
    for c in configs:
        c._experts_implementation = implementation
    try:
        yield
    finally:
        for c, name in before:
            c._experts_implementation = name


def odd_experts(weights: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    """Expert blocks that run by grouped products, whose weights have rows that are not at
    multiples of 16 bytes in every dtype of two bytes or more; ``weights`` by name."""
    if not any("grouped" in str(c._experts_implementation) for c in expert_configs(model)):
        return []
    return [
        path
        for path, module in model.named_modules()
        if hasattr(module, "_apply_gate")
        and any(
            weights[name].dim() == 3 and any(n % ALIGNED for n in weights[name].shape[1:])
            for leaf in module._parameters
            if (name := f"{path}.{leaf}" if path else leaf) in weights
        )
    ]


def settle(model: nn.Module) -> None:
    """Where a smaller model has odd widths, its experts run by the model's own code from now on."""
    odd = odd_experts(dict(model.named_parameters()), model)
    if odd:
        for c in expert_configs(model):
            c._experts_implementation = "eager"
        warnings.warn(
            f"{odd[0]} has widths that are not multiples of {ALIGNED}, which grouped products "
            'cannot read: its experts run as experts_implementation="eager"; masks of multiples '
            f"of {ALIGNED} keep the faster one",
            FxmemWarning, stacklevel=3,
        )  # fmt: skip


def expert_configs(model: nn.Module) -> list[Any]:
    """The configs that say how the expert blocks of ``model`` are dispatched."""
    found = {
        id(c): c
        for m in model.modules()
        if (c := getattr(m, "config", None)) is not None and hasattr(c, "_experts_implementation")
        and hasattr(m, "_apply_gate")
    }  # fmt: skip
    return list(found.values())


@contextlib.contextmanager
def watching(model: nn.Module, watch: Watch) -> Iterator[None]:
    """As :func:`streamable`; ``watch(weight, x, index)`` sees every expert product.

    ``weight``: the parameter; ``x [S, I]``: its rows of input; ``index [S]``: the experts.
    """
    _WATCHERS.append(watch)
    try:
        with streamable(model):
            yield
    finally:
        _WATCHERS.remove(watch)
