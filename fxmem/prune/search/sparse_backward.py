"""A step of sparse training: re-weighted gradients of sub-models, brought to the dense model."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxmem.errors import BudgetError, MaskError
from fxmem.prune.search.ranks import Ranks, reduce_gradients
from fxmem.prune.search.snapshot import Alone
from fxmem.prune.shrink.empty_layers import padded, silence
from fxmem.prune.shrink.materialize import coupling, materialize
from fxmem.prune.shrink.size_attributes import cuts_width
from fxmem.prune.shrink.slicing import slices
from fxmem.prune.units.masks import Masks
from fxmem.prune.units.units import Coupling


def sparse_backward(
    model: nn.Module, masks: Sequence[Masks], batch: Mapping[str, Any], *,
    ratios: Sequence[float] | None = None, coupled: Coupling | None = None, group: Any = None,
) -> float:  # fmt: skip
    """Forward and backward of sub-models; their weight gradients are added to the dense ``.grad``.

    The gradient is ``1/K sum_k ratio_k dL(w * m_k)/dw``, computed in sub-models of the masks' size:
    unbiased for the gradient of the expected loss where the masks were drawn from other
    probabilities than today's (importance weighting). Entries that no mask keeps get 0.

    Args:
        model: the dense model; its weights are read, ``.grad`` of what requires one is written.
        masks: K of them, of this model; the same on every rank.
        batch: keyword arguments of the model, with labels; a rank's own, if there are several.
        ratios: K likelihood ratios, the chance of each mask today over that when it was drawn;
            1 for masks drawn now. See `fxmem.prune.search.estimator.log_ratio`.
        coupled: ``fxmem.coupling(model)``, where it is at hand: tracing takes a while.
        group: a `torch.distributed` group: rank r runs masks r, r + world, ...; ranks exchange
            losses and kept entries of gradients, and all end with the same ``.grad``.

    Returns:
        The mean of the K losses, each times its ratio.

    Raises:
        MaskError: masks of another model, or masks that cut the width of the residual stream.
        BudgetError: no mask, or numbers of masks, ratios and ranks that do not fit.
    """
    exchange = Alone() if group is None else Ranks(group)
    given = [1.0] * len(masks) if ratios is None else [float(r) for r in ratios]
    weights = torch.tensor(given, dtype=torch.float64)
    if not masks or len(weights) != len(masks) or len(masks) % exchange.world:
        raise BudgetError(
            f"{len(masks)} masks, {len(weights)} ratios, {exchange.world} ranks",
            advice="give one ratio per mask and a multiple of the number of ranks",
        )
    plan = coupled or coupling(model)
    ready = [m.on(plan) for m in masks]
    if any(cuts_width(plan, m) for m in ready):
        raise MaskError(
            "gradients of a narrower residual stream are not those of the dense model's norms",
            advice="give masks of heads, channels, experts or layers",
        )
    learned = {n: p for n, p in model.named_parameters() if p.requires_grad}
    own, losses = {}, []
    for k in range(exchange.rank, len(masks), exchange.world):
        loss, own[k] = _one(model, ready[k], batch, plan, learned)
        losses.append([loss])
    kept = [slices(plan, padded(model, plan, m)[0]) for m in ready]
    shapes = {n: p.shape for n, p in learned.items()}
    for name, grad in reduce_gradients(own, kept, weights, shapes, exchange).items():
        p, g = learned[name], grad.to(learned[name].dtype)
        p.grad = g if p.grad is None else p.grad.add_(g)
    every = exchange.losses(torch.tensor(losses, dtype=torch.float64))[:, 0]
    return float((every * weights).mean())


def _one(
    model: nn.Module, masks: Masks, batch: Mapping[str, Any], plan: Coupling,
    learned: Mapping[str, nn.Parameter],
) -> tuple[float, dict[str, Tensor]]:  # fmt: skip
    """Loss and gradients of one sub-model, in its own shapes and the widest of the dtypes."""
    small = materialize(model, masks, plan)
    loss = small(**batch).loss
    loss.backward()
    common = functools.reduce(torch.promote_types, {p.dtype for p in learned.values()})
    values = dict(small.named_parameters())
    grads = {
        name: (torch.zeros_like(p) if p.grad is None else p.grad).to(common)
        for name, p in values.items()
        if name in learned
    }
    # A unit that is there only so that the layer runs has output weights of zero, for good.
    silence({**values, **grads}, plan, *padded(model, plan, masks))
    return float(loss.detach()), grads
