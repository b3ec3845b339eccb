"""Canonicalise: one op per meaning, while a region is traced.

Attention calls become ``fxmem::attention`` (out and logsumexp), cross-entropy becomes a per-token
loss and a reduction by plain ops, and dropout becomes a stateless op keyed by (seed, site, element
position). Everything else is traced as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxmem import _compat, functional
from fxmem.capture import call_node, module_path, source_line
from fxmem.errors import UnsupportedOpError
from fxmem.kernels.attention import attention as attention_op
from fxmem.kernels.dropout import dropout as dropout_op
from fxmem.kernels.token_nll import token_nll as token_nll_op

_NO_INDEX = torch.iinfo(torch.int64).min
"""Ignored by the token loss and not a place of any tensor: wrong indices stay an error."""


class Canonicalize:
    """Calls a node in its canonical form. ``seed`` is the region's dropout seed; ``sites`` counts
    its uses.
    """

    def __init__(self) -> None:
        self.seed: Tensor | None = None
        self.sites = 0
        self._forms: dict[Any, Callable[..., Any]] = {
            F.scaled_dot_product_attention: self.attention,
            F.cross_entropy: self.cross_entropy,
            F.nll_loss: self.nll_loss,
            F.dropout: self.dropout,
            torch.dropout: self.dropout,
            torch.cat: self.cat,
            functional.selected_log_probs: self.selected_log_probs,
        }

    def __call__(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        form = self._forms.get(node.target) if node.op == "call_function" else None
        if form is not None:
            return form(*args, **kwargs)
        if isinstance(node.target, _compat.HigherOrderOperator):
            raise UnsupportedOpError(
                f"higher-order op `{node.target}` inside a streamed region", op=str(node.target),
                module=module_path(node), source=source_line(node),
                advice="call the wrapped function directly "
                "(no activation checkpointing is needed with fxmem)",
            )  # fmt: skip
        return call_node(node, args, kwargs)

    def cat(self, tensors: Any, dim: int = 0, **kwargs: Any) -> Tensor:
        """Joining with an empty tensor (a cache that holds nothing yet) gives the other tensor."""
        full = [t for t in tensors if tuple(t.shape) != (0,)]
        return full[0] if len(full) == 1 and not kwargs else torch.cat(tensors, dim, **kwargs)

    def dropout(
        self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or p == 0.0:
            return x.clone() if inplace else x
        assert self.seed is not None
        self.sites += 1
        return dropout_op(x, self.seed, float(p), self.sites)

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
        learned = attn_mask is not None and attn_mask.requires_grad
        if query.dim() != 4 or dropout_p > 0 or learned:
            return self._explicit_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale
            )
        dtype = _autocast_dtype(query)
        query, key, value = (x.to(dtype) for x in (query, key, value))
        if attn_mask is not None and attn_mask.dim() < 4:
            attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape))
        return attention_op(query, key, value, attn_mask, bool(is_causal), scale)[0]

    def _explicit_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        p: float,
        causal: bool,
        scale: float,
    ) -> Tensor:
        """Matmul, softmax, matmul: streams by its own labels (queries cut, keys whole)."""
        if q.dim() == 4 and q.shape[1] != k.shape[1]:
            n = q.shape[1] // k.shape[1]
            k, v = (x.unsqueeze(2).expand(-1, -1, n, -1, -1).flatten(1, 2) for x in (k, v))
        scores = (q @ k.transpose(-1, -2)) * scale
        if causal:
            rows, columns = (torch.arange(x.shape[-2], device=q.device) for x in (q, k))
            scores = scores.masked_fill(columns > rows.unsqueeze(-1), -math.inf)
        if mask is not None:
            scores = (
                scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
            )
        weights = self.dropout(torch.softmax(scores, -1), p)
        return weights @ v

    def cross_entropy(
        self, input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: Any = None,
        ignore_index: int = -100, reduce: Any = None, reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:  # fmt: skip
        if size_average is not None or reduce is not None or target.dtype.is_floating_point:
            return F.cross_entropy(
                input,
                target,
                weight,
                size_average,
                ignore_index,
                reduce,
                reduction,
                label_smoothing,
            )
        logits, labels = _rows(input, target)
        if torch.is_autocast_enabled(logits.device.type):
            logits = logits.float()
        nll, lse = token_nll_op(logits, labels, ignore_index)
        valid = labels != ignore_index
        if weight is None and not label_smoothing:
            return _reduce(nll, valid.to(nll.dtype), reduction, target.shape)
        scale = valid.to(nll.dtype)
        if weight is not None:
            scale = scale * weight[labels.masked_fill(~valid, 0)]
        nll = nll * scale
        if label_smoothing:
            logp = logits.log_softmax(-1)
            smooth = -(logp if weight is None else logp * weight).sum(-1).masked_fill(~valid, 0)
            nll = nll * (1 - label_smoothing) + smooth * (label_smoothing / logits.shape[-1])
        return _reduce(nll, scale, reduction, target.shape)

    def selected_log_probs(self, logits: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        rows = logits.reshape(-1, logits.shape[-1]).to(dtype)
        nll, _ = token_nll_op(rows, index.reshape(-1), _NO_INDEX)
        return -nll.reshape(index.shape)

    def nll_loss(
        self, input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: Any = None,
        ignore_index: int = -100, reduce: Any = None, reduction: str = "mean",
    ) -> Tensor:  # fmt: skip
        if size_average is not None or reduce is not None:
            return F.nll_loss(input, target, weight, size_average, ignore_index, reduce, reduction)
        logp, labels = _rows(input, target)
        valid = labels != ignore_index
        scale = valid.to(logp.dtype)
        index = labels.masked_fill(~valid, 0)
        if weight is not None:
            scale = scale * weight[index]
        picked = logp.gather(1, index.unsqueeze(1)).squeeze(1)
        return _reduce((-picked * scale).masked_fill(~valid, 0), scale, reduction, target.shape)


def _autocast_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _rows(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits ``[N, C]`` and targets ``[N]``; classes stand in dimension 1 where there are more than
    two.
    """
    if input.dim() > 2:
        input = input.movedim(1, -1).reshape(-1, input.shape[1])
    elif input.dim() == 1:
        input = input.unsqueeze(0)
    return input, target.reshape(-1)


def _reduce(nll: Tensor, scale: Tensor, reduction: str, shape: Any) -> Tensor:
    if reduction == "none":
        return nll.reshape(shape)
    return nll.sum() if reduction == "sum" else nll.sum() / scale.sum()
