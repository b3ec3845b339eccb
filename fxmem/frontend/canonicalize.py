"""Canonicalise: one op per meaning, while a region is traced.

Attention calls become ``fxmem::attention`` (out and logsumexp), cross-entropy becomes a per-token
loss and a reduction by plain ops, and random ops become stateless, keyed by (seed, site, element
position). Everything else is traced as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxmem.frontend import functional_writes as functional
from fxmem.frontend.canonical_attention import attention as canonical_attention
from fxmem.frontend.interpret import call_node
from fxmem.frontend.stateless_random import StatelessRandom
from fxmem.frontend.subgraph import Subgraph
from fxmem.kernels.carried import running_product
from fxmem.kernels.dropout import dropout as dropout_op
from fxmem.kernels.token_nll import token_nll as token_nll_op

_CALLS = ("call_function", "call_method")
_NO_INDEX = torch.iinfo(torch.int64).min
"""Ignored by the token loss and not a place of any tensor: wrong indices stay an error."""


class Canonicalize:
    """Calls a node in its canonical form. ``seed`` is the region's dropout seed; ``sites`` counts
    its uses.
    """

    def __init__(self) -> None:
        self.seed: Tensor | None = None
        self.sites = 0
        self._node: fx.Node | None = None
        self._forms: dict[Any, Callable[..., Any]] = {
            F.scaled_dot_product_attention: self.attention,
            F.cross_entropy: self.cross_entropy,
            F.nll_loss: self.nll_loss,
            F.dropout: self.dropout,
            torch.dropout: self.dropout,
            torch.cat: self.cat,
            torch.concat: self.cat,
            torch.concatenate: self.cat,
            functional.selected_log_probs: self.selected_log_probs,
            torch.cumprod: self.cumprod,
            "cumprod": self.cumprod,
        }

    def site(self) -> tuple[Tensor, int]:
        """The seed and a number for the next draw."""
        assert self.seed is not None
        self.sites += 1
        return self.seed, self.sites

    def drawing(self) -> StatelessRandom:
        return StatelessRandom(self.site, lambda: self._node)

    def __call__(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        self._node = node
        form = self._forms.get(node.target) if node.op in _CALLS else None
        if form is None and isinstance(node.target, FunctionType):
            form = self._inside(node.target)
        if form is not None:
            return form(*args, **kwargs)
        if isinstance(node.target, Subgraph):
            return node.target.apply(args, self)
        return call_node(node, args, kwargs)

    def _inside(self, function: FunctionType) -> Callable[..., Any] | None:
        """A function of ``torch.nn.functional`` that Dynamo takes for one operator, with the
        canonical forms of what it calls: the attention of ``nn.MultiheadAttention``.
        """
        if function.__globals__ is not vars(F):
            return None
        forms = {name: self._forms[f] for name in function.__code__.co_names
                 if (f := vars(F).get(name)) in self._forms}  # fmt: skip
        if not forms:
            return None
        made = FunctionType(function.__code__, {**vars(F), **forms}, function.__name__,
                            function.__defaults__, function.__closure__)  # fmt: skip
        made.__kwdefaults__ = function.__kwdefaults__
        made.__globals__[function.__name__] = made  # which it hands to a mode of torch's
        return made

    def cat(self, tensors: Any, dim: int = 0, **kwargs: Any) -> Tensor:
        """Joining with an empty tensor (a cache that holds nothing yet) gives the other tensor."""
        full = [t for t in tensors if tuple(t.shape) != (0,)]
        return full[0] if len(full) == 1 and not kwargs else torch.cat(tensors, dim, **kwargs)

    def cumprod(self, x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
        x = x if dtype is None else x.to(dtype)
        if not (x.requires_grad and isinstance(x.shape[dim], torch.SymInt)):
            return torch.cumprod(x, dim)
        return running_product(x, dim % x.dim())

    def dropout(
        self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or p == 0.0:
            return x.clone() if inplace else x
        seed, site = self.site()
        return dropout_op(x, seed, float(p), site, [])

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        return canonical_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, self.dropout
        )

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
