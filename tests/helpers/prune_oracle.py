"""Pruning's oracle: masks that multiply the consumers' inputs, many at once, on tiny Llamas."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from fxmem.prune.shrink.gate_gradients import Gates
from fxmem.prune.shrink.materialize import coupling
from fxmem.prune.units.units import UnitGroup


def llama(seed: int, heads: tuple[int, int], channels: int, width: int = 40) -> nn.Module:
    """Two layers of random weights, large enough that every unit has a say."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=width, num_hidden_layers=2, num_attention_heads=heads[0],
        num_key_value_heads=heads[1], head_dim=width // heads[0], intermediate_size=channels,
        initializer_range=0.5,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def layer_groups(model: nn.Module) -> list[UnitGroup]:
    """Heads and channels, in the model's order."""
    return [group for group in coupling(model).groups if group.layer >= 0]


class Divergence:
    """Mean KL divergence per token from the dense model to masked ones, on one batch.

    The dense model's whole distribution is the target, so a unit matters as far as the model uses
    it, and masks differ by more than a few sampled labels would show.
    """

    def __init__(self, model: nn.Module, groups: list[UnitGroup], seed: int) -> None:
        self.model, self.groups = model, groups
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(50, (3, 11), generator=generator)
        with torch.no_grad():
            logits = model(input_ids=self.ids, use_cache=False).logits
        self.dense = logits.log_softmax(-1).double()

    def __call__(self, masks: Tensor) -> Tensor:
        """float64 (N,) of bool (N, units), the groups' units side by side."""
        handles = []
        for group, part in zip(
            self.groups, masks.split([g.size for g in self.groups], 1), strict=True
        ):
            module = self.model.get_submodule(group.consumer[0][0].rpartition(".")[0])
            scale = part.float().repeat_interleave(module.weight.shape[1] // group.size, 1)
            scale = scale.repeat_interleave(len(self.ids), 0)[:, None]
            handles.append(module.register_forward_pre_hook(_times(scale)))
        try:
            with torch.no_grad():
                logits = self.model(
                    input_ids=self.ids.repeat(len(masks), 1), use_cache=False
                ).logits
        finally:
            for handle in handles:
                handle.remove()
        found = logits.double().log_softmax(-1).view(len(masks), *self.dense.shape)
        return (self.dense.exp() * (self.dense - found)).sum(-1).mean((1, 2))

    def instantiate(self, bools: dict[str, Tensor]) -> Callable[[Any], float]:
        """The search's sub-model of one mask; there is one batch, so one measurement."""
        value = float(self(torch.cat([bools[group.name] for group in self.groups])[None]))
        return lambda batch: value

    def gated(self, bools: dict[str, Tensor]) -> Callable[..., Any]:
        """The divergence and its derivatives by gates, inside the sub-model of one mask."""

        def diverge(**batch: Any) -> Tensor:
            found = self.model(**batch).logits.double().log_softmax(-1)
            return (self.dense.exp() * (self.dense - found)).sum(-1).mean()

        def derivatives(batch: Any, inside: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
            with Gates(self.model, self.groups, diverge) as gates:
                loss, found = gates({"input_ids": self.ids}, inside)
            return loss, {name: slope * bools[name] for name, slope in found.items()}

        return derivatives


def _times(scale: Tensor) -> Callable[..., tuple[Tensor]]:
    return lambda module, args: (args[0] * scale,)


def every_choice(units: int, keep: int) -> Tensor:
    """All masks that keep exactly `keep` units: bool (choices, units)."""
    index = torch.tensor(list(itertools.combinations(range(units), keep)))
    return torch.zeros(len(index), units, dtype=torch.bool).scatter_(1, index, True)


def plant(model: nn.Module, groups: list[UnitGroup], blocks: int, seed: int) -> dict[str, Tensor]:
    """Zero the consumers' columns of half of the units, channels in `blocks` runs; what is left."""
    generator = torch.Generator().manual_seed(seed)
    live, odd = {}, 1
    for group in groups:
        parts = blocks if group.size % blocks == 0 and group.size > blocks else group.size
        # Odd counts alternate, so that half of each kind lives in the whole model.
        keep = (parts + (odd if group.layer == 0 else 1 - odd)) // 2
        chosen = torch.zeros(parts, dtype=torch.bool)
        chosen[torch.randperm(parts, generator=generator)[:keep]] = True
        live[group.name] = chosen.repeat_interleave(group.size // parts)
        weight = model.get_parameter(group.consumer[0][0])
        weight.data *= live[group.name].repeat_interleave(weight.shape[1] // group.size)
    return live
