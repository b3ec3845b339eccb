"""A linear layer restricted to kept output rows and kept input columns, without copying the weight.

Letters: N tokens, O and I the weight's features, P kept outputs, Q kept inputs. ``y = x
W[rows][:, columns]^T + bias[rows]``: with ``rows`` and ``columns`` the indices a mask keeps, this
is the pruned layer, and a candidate sub-model can be scored straight from the full weights. Rows
are gathered as whole lines; columns cost uncoalesced reads, sorted indices soften that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxmem.kernels._triton import Config, cdiv, config, dot_precision, jit, launch, rows_last, tl
from fxmem.kernels.registry import Cost, Kernel, Sample, signature


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    *,
    config: Config | None = None,
) -> Tensor:
    """``x [N, Q]``, ``weight [O, I]``, ``bias [O]``, ``rows [P]``, ``columns [Q]`` int64 -> ``[N,
    P]``; ``None`` keeps all.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    w = weight if rows is None else weight.index_select(0, rows)
    w = w if columns is None else w.index_select(1, columns)
    y = x.to(wide) @ w.to(wide).t()
    if bias is not None:
        y = y + (bias if rows is None else bias[rows])
    return y.to(x.dtype)


@jit
def _gathered(
    X, W, BIAS, ROWS, COLUMNS, Y, tokens, outputs, inputs, x_n, w_o,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    row = p.to(tl.int64)
    if ROWS is not None:
        row = tl.load(ROWS + p, mask=p < outputs, other=0)
    acc = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    for start in range(0, inputs, BLOCK_Q):
        q = start + tl.arange(0, BLOCK_Q)
        column = q.to(tl.int64)
        if COLUMNS is not None:
            column = tl.load(COLUMNS + q, mask=q < inputs, other=0)
        x_at = X + n[:, None].to(tl.int64) * x_n + q[None, :]
        x = tl.load(x_at, (n < tokens)[:, None] & (q < inputs)[None, :], 0.0)
        w_at = W + row[None, :] * w_o + column[:, None]
        w = tl.load(w_at, (p < outputs)[None, :] & (q < inputs)[:, None], 0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    if BIAS is not None:
        acc += tl.load(BIAS + row, mask=p < outputs, other=0.0).to(tl.float32)[None, :]
    inside = (n < tokens)[:, None] & (p < outputs)[None, :]
    tl.store(Y + n[:, None].to(tl.int64) * outputs + p[None, :], acc, mask=inside)


CONFIGS = (
    config(8, 2, N=128, P=128, Q=32),
    config(4, 2, N=64, P=64, Q=32),
    config(4, 3, N=64, P=128, Q=32),
    config(8, 2, N=64, P=128, Q=32),
)


def choose(dtype: torch.dtype) -> Config:
    """The default configuration: the widest that spills nothing."""
    return CONFIGS[3] if dtype == torch.float32 else CONFIGS[0]


def launcher(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    *,
    config: Config | None = None,
) -> Tensor:
    """As :func:`reference`."""
    (n, q), p = x.shape, weight.shape[0] if rows is None else rows.shape[0]
    if q != (weight.shape[1] if columns is None else columns.shape[0]):
        raise ValueError(f"x has {q} features, which is not the number of kept columns")
    x, weight, config = rows_last(x), rows_last(weight), config or choose(x.dtype)
    y = x.new_empty(n, p)
    launch(
        _gathered, (cdiv(n, config.blocks["BLOCK_N"]), cdiv(p, config.blocks["BLOCK_P"])), config,
        X=x, W=weight, BIAS=bias, ROWS=rows, COLUMNS=columns, Y=y, tokens=n, outputs=p, inputs=q,
        x_n=x.stride(0), w_o=weight.stride(0), PRECISION=dot_precision(x.dtype),
    )  # fmt: skip
    return y


_N, _O, _I = 2048, 14336, 4096  # a chunk of the MLP of Llama 3 8B, half of it kept


def _sample(
    label: str, by_rows: bool, by_columns: bool, dtype: torch.dtype = torch.bfloat16
) -> Sample:
    p, q = _O // 2 if by_rows else _O, _I // 2 if by_columns else _I
    new: dict[str, Any] = {"device": "meta", "dtype": dtype}
    args = (
        torch.empty(_N, q, **new),
        torch.empty(_O, _I, **new),
        None,
        torch.empty(p, dtype=torch.int64, device="meta") if by_rows else None,
        torch.empty(q, dtype=torch.int64, device="meta") if by_columns else None,
    )
    cost = Cost(2 * _N * p * q, dtype.itemsize * (_N * (p + q) + p * q))
    return Sample(label, lambda: (args, {}), cost, dtype)


KERNELS = (
    Kernel(
        name="gathered_matmul",
        ops=("aten.mm.default", "aten.addmm.default"),
        signature=signature("n q, o i, o, p, q -> n p", "q o i"),
        reference=reference,
        launch=launcher,
        configs=CONFIGS,
        samples=(
            _sample("half the rows", True, False),
            _sample("half the columns", False, True),
            _sample("half of both", True, True),
            _sample("half of both, float32", True, True, torch.float32),
        ),
    ),
)
