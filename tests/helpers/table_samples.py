"""Sample calls for the axis-signature table, as (op, args, kwargs): asymmetric shapes, float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fxmem  # noqa: F401  (registers the fxmem ops)
from fxmem.axes.signature import AxisRule, Call, Signature, TensorInfo
from fxmem.axes.sizes import sizes
from fxmem.rules import TABLE, lookup
from fxmem.rules.carried import CALLS, Called


def f(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def i(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape)


def b(*shape: int) -> Tensor:
    return torch.rand(shape) > 0.3


def rms_norm_backward(
    grad: Tensor, x: Tensor, _shape: list[int], rstd: Tensor, w: Tensor, _mask: list[bool]
) -> tuple[Tensor, Tensor]:
    """What the op computes, by hand: torch has no CPU kernel for it."""
    y, g = x * rstd, grad * w
    return rstd * (g - y * (g * y).mean(-1, keepdim=True)), (grad * y).flatten(0, -2).sum(0)


BY_HAND = {"aten._fused_rms_norm_backward.default": rms_norm_backward}


@dataclass(frozen=True)
class Sample:
    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def target(self) -> Any:
        namespace, name, overload = self.op.split(".")
        return getattr(getattr(getattr(torch.ops, namespace), name), overload)

    @property
    def row(self) -> AxisRule:
        row = lookup(self.target)
        assert row is not None, f"{self.op} has no row"
        return row

    def run(self, args: tuple[Any, ...] | None = None) -> tuple[Tensor | None, ...]:
        function = BY_HAND.get(self.op, self.target)
        out = function(*(self.args if args is None else args), **self.kwargs)
        return tuple(out) if isinstance(out, (tuple, list)) else (out,)

    @property
    def call(self) -> Call:
        outs = tuple(None if o is None else info(o) for o in self.run())
        return Call(self.op, map_tensors(self.args, info), self.kwargs, outs)

    @property
    def signature(self) -> Signature:
        signature = self.row.rule(self.call)
        assert signature is not None, f"{self.op} gives no signature for {self.args}"
        return signature


def info(t: Tensor) -> TensorInfo:
    return TensorInfo(sizes(t.shape), t.dtype)


def map_tensors(args: Any, fn: Callable[[Tensor], Any]) -> Any:
    """``args`` with ``fn`` applied to every tensor, in argument order."""
    if isinstance(args, (tuple, list)):
        return type(args)(map_tensors(a, fn) for a in args)
    return fn(args) if isinstance(args, Tensor) else args


def _softmax_pair() -> tuple[Tensor, Tensor]:
    return f(2, 4, 6), f(2, 4, 6).softmax(-1)


def _norm_backward(*, rms: bool) -> tuple[Any, ...]:
    x, w = f(2, 4, 6), f(6)
    if rms:
        rstd = (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        return f(2, 4, 6), x, [6], rstd, w, [True, True]
    mean = x.mean(-1, keepdim=True)
    rstd = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
    return f(2, 4, 6), x, [6], mean, rstd, w, f(6), [True, True, True]


def _attention() -> list[tuple[Any, ...]]:
    q, k, v = f(2, 4, 6, 8), f(2, 2, 5, 8), f(2, 2, 5, 3)
    return [(q, k, v, None, False, 0.3), (q, k, v, b(2, 1, 6, 5), False, 0.3)]


def _attention_backward() -> list[tuple[Any, ...]]:
    calls = []
    for q, k, v, mask, causal, scale in _attention():
        out, lse = torch.ops.fxmem.attention(q, k, v, mask, causal, scale)
        calls.append((f(*out.shape), q, k, v, out, lse, mask, causal, scale))
    return calls


def _nll_backward() -> tuple[Any, ...]:
    logits = f(6, 5)
    return f(6), logits, torch.tensor([1, 0, -100, 4, 2, 2]), logits.logsumexp(-1), -100


def _calls() -> dict[str, list[tuple[Any, ...]]]:
    x = f(2, 4, 6)
    reduced = [(x, [1]), (x, [0, 2], True)]
    by_dim = [(x, 1), (x, 2, True)]
    table: dict[str, list[tuple[Any, ...]]] = {
        "mm.default": [(f(4, 6), f(6, 2))], "bmm.default": [(f(2, 4, 6), f(2, 6, 8))],
        "addmm.default": [(f(2), f(4, 6), f(6, 2)), (f(4, 1), f(4, 6), f(6, 2))],
        "baddbmm.default": [(f(2, 1, 8), f(2, 4, 6), f(2, 6, 8))], "mv.default": [(f(4, 6), f(6))],
        "dot.default": [(f(6), f(6))], "sum.dim_IntList": reduced, "sum.default": [(x,)],
        "mean.dim": reduced, "mean.default": [(x,)], "amax.default": reduced,
        "amin.default": reduced, "max.dim": by_dim, "min.dim": by_dim,
        "argmax.default": [*by_dim, (x,)], "argmin.default": by_dim, "any.dim": [(b(4, 6), 1)],
        "any.dims": [(b(2, 4, 6), [1])],
        "all.dim": [(torch.tensor([[True, False, True, True], [True, True, True, True]]), 1)],
        "prod.dim_int": by_dim, "logsumexp.default": reduced, "var.correction": reduced[:1],
        "var_mean.correction": reduced[:1],
        "linalg_vector_norm.default": [(x, 2, [1]), (x, 2, [2], True)],
        "_softmax.default": [(x, -1, False), (x, 1, False)],
        "_log_softmax.default": [(x, -1, False)],
        "_softmax_backward_data.default": [(*_softmax_pair(), -1, torch.float64)],
        "_log_softmax_backward_data.default": [(f(2, 4, 6), x.log_softmax(-1), -1, torch.float64)],
        "log_sigmoid_forward.default": [(x,)],
        "log_sigmoid_backward.default": [(f(2, 4, 6), x, (-x.abs()).exp())],
        "cumsum.default": [(x, 1)],
        "native_layer_norm.default": [
            (x, [6], f(6), f(6), 1e-05),
            (x, [4, 6], f(4, 6), None, 1e-05),
        ],
        "native_layer_norm_backward.default": [_norm_backward(rms=False)],
        "_fused_rms_norm.default": [(x, [6], f(6), 1e-05), (x, [6], None, 1e-05)],
        "_fused_rms_norm_backward.default": [_norm_backward(rms=True)],
        "view.default": [(x, [8, 6]), (x, [2, 4, 3, 2]), (f(8, 6), [2, 4, 6]), (x, [2, 1, 24])],
        "_unsafe_view.default": [(x, [8, 6])], "reshape.default": [(x, [2, 4, 3, 2])],
        "expand.default": [(f(2, 1, 6), [2, 4, 6]), (f(6), [2, 4, 6]), (f(2, 4, 1), [-1, -1, 6])],
        "permute.default": [(x, [2, 0, -2])], "transpose.int": [(x, 1, -1)],
        "t.default": [(f(4, 6),)], "unsqueeze.default": [(x, -1), (x, 1)],
        "squeeze.dim": [(f(2, 1, 6), 1), (x, 1)], "squeeze.dims": [(f(2, 1, 6, 1), [1, 3])],
        "squeeze.default": [(f(2, 1, 6, 1),)],
        "slice.Tensor": [(x, 1, 1, 3), (x, 1, 0, -1), (x, 2, -4), (x, 2, 0, 6, 2)],
        "slice_backward.default": [
            (f(2, 3, 6), [2, 4, 6], 1, 1, 4, 1),
            (f(2, 4, 3), [2, 4, 6], 2, 0, 6, 2),
        ],
        "select.int": [(x, 1, 2), (x, 2, -1)],
        "select_backward.default": [(f(2, 6), [2, 4, 6], 1, 2)],
        "cat.default": [([x, f(2, 4, 2)], -1), ([x, x + 1], 1)],
        "stack.default": [([x, x + 1], 1), ([x, x + 1], -1)],
        "split.Tensor": [(x, 2, 1), (x, 3, 2)], "split_with_sizes.default": [(x, [1, 5], -1)],
        "unbind.int": [(x, 1)],
        "repeat.default": [
            (x, [1, 2, 1]), (x, [3, 1, 2]), (f(2, 1, 6), [1, 4, 1]), (f(4, 6), [2, 1, 1]),
        ],
        "flip.default": [(x, [1])], "roll.default": [(x, [1], [1])],
        "constant_pad_nd.default": [(x, [1, 0]), (x, [0, 0, 2, 1])], "clone.default": [(x,)],
        "detach.default": [(x,)], "alias.default": [(x,)], "lift_fresh_copy.default": [(x,)],
        "_to_copy.default": [(x,)], "arange.default": [(6,)], "arange.start": [(1, 6)],
        "arange.start_step": [(1, 9, 2)], "full.default": [([4, 6], 0.5)],
        "zeros.default": [([4, 6],)], "ones.default": [([4, 6],)],
        "new_zeros.default": [(x, [4, 3])], "new_ones.default": [(x, [4, 3])],
        "new_full.default": [(x, [4, 3], 0.5)], "full_like.default": [(x, 0.5)],
        "zeros_like.default": [(x,)], "ones_like.default": [(x,)],
        "embedding.default": [(f(8, 6), i(8, 2, 4))],
        "embedding_dense_backward.default": [(f(2, 4, 6), i(8, 2, 4), 8, -1, False)],
        "gather.default": [(x, 2, i(6, 2, 4, 3)), (x, 1, i(4, 2, 3, 2))],
        "scatter.value": [(x, 2, i(6, 2, 4, 1), 1.5)],
        "scatter.src": [(x, 2, torch.tensor([1, 5]).expand(2, 4, 2).contiguous(), f(2, 4, 2))],
        "scatter_add.default": [(x, 2, i(6, 2, 4, 3), f(2, 4, 3))],
        "index.Tensor": [
            (x, [i(2, 5), i(4, 5)]),
            (f(8, 6), [i(8, 2, 4)]),
            (x, [i(2, 3, 1), i(4, 1, 2)]),
            (x, [None, i(4, 5)]),
            (f(2, 4, 3, 5), [None, i(4, 2, 1), i(3, 1, 3)]),
        ],
        "_unsafe_index.Tensor": [(x, [None, i(4, 5, 1), i(6, 3)])],
        "_unsafe_index_put.default": [(x, [None, i(4, 5, 1), i(6, 3)], f(2, 5, 3), True)],
        "searchsorted.Tensor": [(f(4, 6).sort(-1).values, f(4, 3)), (f(6).sort().values, f(3))],
        "index_select.default": [(x, 1, i(4, 6))], "topk.default": [(x, 3), (x, 2, 1)],
        "sort.default": [(x, 1), (x,)],
        "index_add.default": [(x, 1, i(4, 3), f(2, 3, 6))],
        "index_copy.default": [(x, 1, torch.tensor([2, 0]), f(2, 2, 6))],
        "index_fill.int_Scalar": [(x, 1, torch.tensor([2, 0]), 0.5)],
        "index_put.default": [
            (x, [torch.tensor([0, 1]), torch.tensor([3, 2])], f(2, 6), True),
            (f(8, 6), [i(8, 2, 4)], f(2, 4, 6), True), (f(8, 6), [i(8, 3, 1)], f(6), True),
            (x, [None, i(4, 5)], f(2, 5, 6), True),
            (x, [None, None, torch.tensor([4])], f(2, 4, 1)),
            (f(2, 4, 3, 5), [None, i(4, 2, 1), i(3, 1, 3)], f(2, 2, 3, 5), True),
        ],
        "scatter_reduce.two": [(x, 2, i(6, 2, 4, 3), f(2, 4, 3), "sum")],
        "bucketize.Tensor": [(x, f(5).sort().values)],
        "slice_scatter.default": [(x, f(2, 2, 6), 1, 1, 3)],
        "select_scatter.default": [(x, f(2, 6), 1, 2)],
        "unfold.default": [(x, 2, 3, 1)],
        "unfold_backward.default": [(f(2, 4, 4, 3), [2, 4, 6], 2, 3, 1)],
        "diagonal.default": [(f(2, 4, 4), 0, 1, 2)],
        "diagonal_backward.default": [(f(2, 4), [2, 4, 4], 0, 1, 2)],
        "diag_embed.default": [(f(2, 4),)],
        "view_as_real.default": [(torch.complex(x, x + 1),)],
        "view_as_complex.default": [(f(4, 6, 2),)],
        **_more_reductions(x), **_windows(),
    }  # fmt: skip
    # Dropout with p = 0: its mask depends on positions, which only the emitter's form of the op
    # knows; chunks of a real mask are compared in test_kernels.py.
    fused = {
        "fxmem.attention.default": _attention(),
        "fxmem.attention_backward.default": _attention_backward(),
        "fxmem.token_nll.default": [(f(6, 5), torch.tensor([1, 0, -100, 4, 2, 2]), -100)],
        "fxmem.token_nll_backward.default": [_nll_backward()],
        "fxmem.expert_linear.default": [(f(8, 6), f(3, 2, 6), i(3, 8))],
        "fxmem.expert_weight_grad.default": [(f(8, 2), f(8, 6), i(3, 8), 3)],
        "fxmem.dropout.default": [(x, torch.tensor(7), 0.4, 1, [])],
        "fxmem.uniform.default": [
            (torch.tensor(7), [2, 4, 6], 1, [], dtype, torch.device("cpu"))
            for dtype in (torch.float32, torch.float64)
        ],
    }  # fmt: skip
    return {**{f"aten.{k}": v for k, v in table.items()}, **fused}


def _more_reductions(x: Tensor) -> dict[str, list[tuple[Any, ...]]]:
    by_dim = [(x, 1), (x, 2, True)]
    return {
        "count_nonzero.dim_IntList": [(b(2, 4, 6), [1])],
        "count_nonzero.default": [(b(2, 4),), (b(2, 4), 1)],
        "max.default": [(x,)], "min.default": [(x,)], "any.default": [(b(4, 6),)],
        "all.default": [(torch.tensor([[True, False], [True, True]]),)], "prod.default": [(x,)],
        "median.dim": by_dim, "nanmedian.dim": by_dim, "mode.default": [*by_dim, (i(3, 2, 5),)],
        "kthvalue.default": [(x, 2, 1), (x, 2)], "cumprod.default": [(x, 1)],
        "logcumsumexp.default": [(x, 1)], "cummax.default": [(x, 1)], "cummin.default": [(x, -1)],
        "_cdist_forward.default": [(f(2, 4, 6), f(2, 3, 6), 2.0, None)],
        "_cdist_backward.default": [
            (f(2, 4, 3), x, (y := f(2, 3, 6)), 2.0, torch.cdist(x, y)),
        ],
    }  # fmt: skip


def _windows() -> dict[str, list[tuple[Any, ...]]]:
    """Convolutions with and without bias, of one position alone, in groups; pooling; transforms."""
    one, three, grouped = f(4, 6, 1), f(4, 6, 3), f(6, 2, 3)
    x, image = f(2, 6, 5), f(2, 3, 4, 6)
    rest = ([1], [0], [1], False, [0])
    pooled, index = torch.ops.aten.max_pool2d_with_indices(image, [2, 2], [2, 2])
    back = [True, True, True]
    complex_image = torch.complex(image, image + 1)
    scale, moments = (f(3), f(3)), (f(3), f(3).abs() + 0.1)
    return {
        "native_batch_norm.default": [(image, *scale, *moments, False, 0.1, 1e-5)],
        "_native_batch_norm_legit_no_training.default": [
            (image, *scale, *moments, 0.1, 1e-5), (f(5, 3), None, None, *moments, 0.1, 1e-5),
        ],
        "native_batch_norm_backward.default": [
            (f(2, 3, 4, 6), image, scale[0], *moments, f(0), f(0), False, 1e-5, back),
        ],
        "convolution.default": [
            (x, one, None, *rest, 1), (x, one, f(4), *rest, 1), (x, grouped, None, *rest, 3),
            (x, three, None, [1], [1], [1], False, [0], 1),
            (x, grouped, f(6), *rest, 3), (x, f(6, 1, 3), f(6), *rest, 6),
            (x, f(12, 1, 1), None, *rest, 6), (x, f(6, 4, 2), f(4), [2], [0], [1], True, [0], 1),
            (x, f(6, 2, 2), None, [2], [0], [1], True, [0], 3),
        ],
        "convolution_backward.default": [
            (f(2, 4, 5), x, one, [4], *rest, 1, back),
            (f(2, 4, 5), x, one, [4], *rest, 1, [True, True, False]),
            (f(2, 6, 3), x, grouped, [6], *rest, 3, back),
            (f(2, 6, 3), x, f(6, 1, 3), [6], *rest, 6, back),
        ],
        "avg_pool2d.default": [(image, [2, 2])],
        "avg_pool2d_backward.default": [
            (f(2, 3, 2, 3), image, [2, 2], [2, 2], [0, 0], False, True, None)
        ],
        "max_pool2d_with_indices.default": [(image, [2, 2])],
        "max_pool2d_with_indices_backward.default": [
            (f(*pooled.shape), image, [2, 2], [2, 2], [0, 0], [1, 1], False, index)
        ],
        "_adaptive_avg_pool2d.default": [(image, [2, 3])],
        "_adaptive_avg_pool2d_backward.default": [(f(2, 3, 2, 3), image)],
        "upsample_nearest2d.vec": [(image, [7, 9], None), (image, None, [2.0, 2.0])],
        "upsample_bilinear2d.vec": [(image, [7, 9], False, None)],
        "_fft_r2c.default": [(image, [3], 0, True)],
        "_fft_c2c.default": [(complex_image, [2], 0, True)],
        "_fft_c2r.default": [(complex_image, [3], 0, 10)],
    }  # fmt: skip


def _rnn(tensors: Any, state: Tensor) -> tuple[Tensor, Tensor]:
    x, w = tensors
    rows = []
    for row in x.unbind(1):
        state = torch.tanh(row @ w + state.sum(-1, keepdim=True) / 4)
        rows.append(state)
    return torch.stack(rows, 1), state


CALLS["rnn"] = Called(
    ("btd", "de"), "bte", "be", _rnn, lambda: torch.float64, lambda: torch.float64, None
)


def _recurrences() -> list[Sample]:
    x, w, zeros = f(2, 4, 6), f(6, 3), torch.zeros(1, 2, 3, dtype=torch.float64)
    later = (f(2, 4, 3), f(1, 2, 3), [x, w], zeros, "rnn", [True, True])
    return [
        Sample("fxmem.recurrence.default", ([x, w], "rnn")),
        Sample("fxmem.recurrence_backward.default", later),
    ]


def _carried() -> list[Sample]:
    x, halved, weight = f(2, 4, 6), f(4, 2, 3), f(4, 4, 3)
    before = torch.zeros(1, 2, 4, 4, dtype=x.dtype)
    grouped = (x, halved, None, 1, 2)
    calls: dict[str, list[tuple[Any, ...]]] = {
        "delay": [(x, 1, 2), (x, 2, -1)], "running_sum": [(x, 1, False), (x, 2, True)],
        "running_logsumexp": [(x, 1, False), (x, 2, True)],
        "linear_recurrence": [(f(2, 4, 6), x, 1, False), (f(2, 4, 6), x, 2, True)],
        "causal_conv": [(x, weight, f(4), 2, 1), (x, weight, None, 1, 1), grouped],
        "causal_conv_backward": [
            (f(2, 4, 6), x, weight, before, 2, 1), (f(2, 4, 6), x, halved, before[..., :2], 1, 2)
        ],
    }  # fmt: skip
    return [Sample(f"fxmem.{op}.default", a) for op, given in calls.items() for a in given]


STATES_OF: dict[str, Callable[..., Sample]] = {
    "fxmem.causal_conv_backward.default": lambda grad, x, weight, before, dilation, groups: Sample(
        "fxmem.causal_conv.default", (x, weight, None, dilation, groups)
    ),
    "fxmem.recurrence_backward.default": lambda grad, last, tensors, before, key, wanted: Sample(
        "fxmem.recurrence.default", (tensors, key)
    ),
}
"""By op: the call whose states are an operand of it."""


def _pointwise() -> list[Sample]:
    x = f(2, 4, 6)
    calls: dict[str, tuple[Any, ...]] = {
        "add.Tensor": (x, f(4, 1)), "mul.Tensor": (x, f(6)), "sub.Tensor": (x, f(2, 1, 6)),
        "div.Tensor": (x, f(1, 4, 6)), "neg.default": (x,), "exp.default": (x,),
        "gelu.default": (x,), "silu.default": (x,), "tanh.default": (x,),
        "rsqrt.default": (x.abs() + 1,), "pow.Tensor_Scalar": (x, 2),
        "where.self": (b(4, 6), x, f(6)), "masked_fill.Scalar": (x, b(4, 1), 0.5),
        "gelu_backward.default": (x, f(2, 4, 6)), "silu_backward.default": (f(2, 4, 6), x),
        "threshold_backward.default": (f(2, 4, 6), x, 0.0),
        "hardswish.default": (x,), "hardswish_backward.default": (f(2, 4, 6), x),
        "hardsigmoid_backward.default": (f(2, 4, 6), x),
        "mish_backward.default": (f(2, 4, 6), x), "_prelu_kernel.default": (x, f(1, 4, 1)),
        "_prelu_kernel_backward.default": (f(2, 4, 6), x, f(1, 4, 1)),
        "fill.Scalar": (x, 0.5), "logical_and.default": (b(2, 1, 6), b(4, 1)),
        "le.Tensor": (i(5, 1, 6), i(5, 4, 1)),
    }  # fmt: skip
    return [Sample(f"aten.{k}", v) for k, v in calls.items()]


KWARGS: dict[str, dict[str, Any]] = {
    "aten.var.correction": {"correction": 1},
    "aten.var_mean.correction": {"correction": 0, "keepdim": True},
    "aten._to_copy.default": {"dtype": torch.float32},
}

UNSAMPLED = {
    "aten.empty.memory_format": "its values are undefined",
    "aten.new_empty.default": "its values are undefined",
    "aten.empty_like.default": "its values are undefined",
}


def all_samples() -> list[Sample]:
    """The same values at every call."""
    state = torch.get_rng_state()
    torch.manual_seed(11)
    out = [Sample(op, a, KWARGS.get(op, {})) for op, calls in _calls().items() for a in calls]
    out += _pointwise() + _carried() + _recurrences()
    torch.set_rng_state(state)
    return out


SAMPLES = all_samples()
IDS = [f"{s.op.removeprefix('aten.')}-{n}" for n, s in enumerate(SAMPLES)]
MISSING = set(TABLE) - {s.op for s in SAMPLES} - set(UNSAMPLED)
