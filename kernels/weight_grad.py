"""Weight gradients of a chunk: added into a float32 accumulator, or straight into the weight.

Letters: N tokens of the chunk, O output and I input features. ``acc += scale dY^T X`` needs no
temporary of the weight's size. For in-backward SGD and sign updates the last chunk finishes the sum
and updates in the same pass: ``G = acc + scale dY^T X``, then ``W = (1 - lr decay) W - lr G``, or
``sign G`` in place of G; with a single chunk no accumulator exists at all. A bfloat16 weight is
rounded stochastically with bits that depend on (key, element number) only, see :mod:`stochastic`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxmem.kernels import stochastic
from fxmem.kernels._device import random_bits, round_stochastically
from fxmem.kernels._triton import Config, cdiv, config, dot_precision, jit, launch, tl
from fxmem.kernels.kernel import Cost, Kernel, Sample, signature
from fxmem.kernels.layout import rows_last


def reference(
    acc: Tensor, dy: Tensor, x: Tensor, *, scale: float = 1.0, config: Config | None = None
) -> Tensor:
    """Adds ``scale dy^T x`` into ``acc [O, I]``; ``dy [N, O]``, ``x [N, I]``. Returns ``acc``."""
    return acc.addmm_(dy.t().to(acc.dtype), x.to(acc.dtype), alpha=scale)


def reference_update(
    weight: Tensor,
    dy: Tensor,
    x: Tensor,
    acc: Tensor | None = None,
    *,
    lr: float,
    rule: str = "sgd",
    decay: float = 0.0,
    scale: float = 1.0,
    key: int = 0,
    first: int = 0,
    pitch: int = 0,
    config: Config | None = None,
) -> Tensor:
    """Updates ``weight [O, I]`` in place; ``rule`` is ``"sgd"`` or ``"sign"``. Returns it.

    ``first`` is the number of element (0, 0) in the whole parameter and ``pitch`` the length of a
    whole row (0: I); they matter where ``weight`` is a shard.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    grad = dy.t().to(wide) @ x.to(wide) * scale
    grad = grad if acc is None else grad + acc
    grad = torch.sign(grad) if rule == "sign" else grad
    old = weight.to(wide)
    new = old * (1 - lr * decay) - lr * grad
    index = stochastic.element_index(weight.shape, first, pitch or weight.shape[1], weight.device)
    return weight.copy_(stochastic.round_to(new, weight.dtype, index, key))


@jit
def _weight_grad(
    DY, X, ACC, W, rows, dy_n, dy_o, x_n, acc_o, w_o, scale, lr, shrink, key, first, pitch,
    OUTS: tl.constexpr, INS: tl.constexpr, RULE: tl.constexpr, STOCHASTIC: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    grad = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for start in range(0, rows, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        n_at = n.to(tl.int64)
        dy_at = DY + n_at[None, :] * dy_n + o[:, None].to(tl.int64) * dy_o
        x_at = X + n_at[:, None] * x_n + i[None, :]
        dy = tl.load(dy_at, (n < rows)[None, :] & (o < OUTS)[:, None], 0.0)
        x = tl.load(x_at, (n < rows)[:, None] & (i < INS)[None, :], 0.0)
        grad = tl.dot(dy, x, grad, input_precision=PRECISION)
    grad = grad * scale
    inside = (o < OUTS)[:, None] & (i < INS)[None, :]
    row = o[:, None].to(tl.int64)
    if ACC is not None:
        acc_at = ACC + row * acc_o + i[None, :]
        grad += tl.load(acc_at, mask=inside, other=0.0)
    if RULE == "add":
        tl.store(acc_at, grad, mask=inside)
    else:
        if RULE == "sign":
            grad = tl.where(grad > 0, 1.0, tl.where(grad < 0, -1.0, grad))
        w_at = W + row * w_o + i[None, :]
        w = tl.load(w_at, mask=inside, other=0.0).to(tl.float32)
        w = w * shrink - lr * grad
        if STOCHASTIC:
            w = round_stochastically(w, random_bits(first + row * pitch + i[None, :], key))
        tl.store(w_at, w.to(W.dtype.element_ty), mask=inside)


CONFIGS = (
    config(8, 2, O=128, I=128, N=32),
    config(4, 3, O=64, I=128, N=32),
    config(4, 2, O=64, I=64, N=64),
)


def _launch(
    dy: Tensor,
    x: Tensor,
    acc: Tensor | None,
    weight: Tensor | None,
    config: Config | None,
    **given: Any,
) -> None:
    o, i = dy.shape[1], x.shape[1]
    dy, x, config = dy if dy.stride(0) == 1 else rows_last(dy), rows_last(x), config or CONFIGS[0]
    launch(
        _weight_grad, (cdiv(o, config.blocks["BLOCK_O"]), cdiv(i, config.blocks["BLOCK_I"])),
        config, DY=dy, X=x, ACC=acc, W=weight, rows=dy.shape[0], dy_n=dy.stride(0),
        dy_o=dy.stride(1), x_n=x.stride(0), acc_o=0 if acc is None else acc.stride(0),
        w_o=0 if weight is None else weight.stride(0), OUTS=o, INS=i,
        PRECISION=dot_precision(dy.dtype), **given,
    )  # fmt: skip


def launcher(
    acc: Tensor, dy: Tensor, x: Tensor, *, scale: float = 1.0, config: Config | None = None
) -> Tensor:
    """As :func:`reference`; ``acc`` is float32 with contiguous rows, ``dy`` may be transposed."""
    unused = {"lr": 0.0, "shrink": 1.0, "key": 0, "first": 0, "pitch": 0, "STOCHASTIC": False}
    _launch(dy, x, acc, None, config, scale=float(scale), RULE="add", **unused)
    return acc


def launcher_update(
    weight: Tensor,
    dy: Tensor,
    x: Tensor,
    acc: Tensor | None = None,
    *,
    lr: float,
    rule: str = "sgd",
    decay: float = 0.0,
    scale: float = 1.0,
    key: int = 0,
    first: int = 0,
    pitch: int = 0,
    config: Config | None = None,
) -> Tensor:
    """As :func:`reference_update`; rows of ``weight`` and ``acc`` (float32) are contiguous."""
    if rule not in ("sgd", "sign"):
        raise ValueError(f"rule {rule!r} is neither 'sgd' nor 'sign'")
    _launch(
        dy, x, acc, weight, config, scale=float(scale), RULE=rule, lr=float(lr),
        shrink=1.0 - lr * decay, key=key, first=first, pitch=pitch or weight.shape[1],
        STOCHASTIC=weight.dtype == torch.bfloat16,
    )  # fmt: skip
    return weight


_N, _O, _I = 2048, 14336, 4096  # a chunk of the MLP of Llama 3 8B
_COST = Cost(2 * _N * _O * _I, 2 * _N * (_O + _I) + 8 * _O * _I)
_UPDATE = Cost(2 * _N * _O * _I, 2 * _N * (_O + _I) + 4 * _O * _I)


def _operands(
    dtype: torch.dtype, main: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    new: dict[str, Any] = {"device": "meta", "dtype": main}
    matrix = torch.empty(_O, _I, device="meta", dtype=dtype)
    return matrix, torch.empty(_N, _O, **new), torch.empty(_N, _I, **new)


def _update(rule: str) -> Sample:
    given = {"lr": 1e-3, "rule": rule, "key": 12345}
    return Sample(
        f"{rule}, N {_N}, O {_O}, I {_I}", lambda: (_operands(torch.bfloat16), given), _UPDATE
    )


KERNELS = (
    Kernel(
        name="weight_grad",
        ops=("aten.mm.default", "aten.addmm.default"),
        signature=signature("n o, n i -> o i", "o i"),
        reference=reference,
        launch=launcher,
        configs=CONFIGS,
        samples=(
            Sample(f"N {_N}, O {_O}, I {_I}", lambda: (_operands(torch.float32), {}), _COST),
            Sample(
                "float32",
                lambda: (_operands(torch.float32, torch.float32), {}),
                _COST,
                torch.float32,
            ),
        ),
        accumulators=("acc",),
        limits="a float32 accumulator",
    ),
    Kernel(
        name="weight_update",
        ops=(),
        signature=signature("o i, n o, n i, o i -> o i", "o i n"),
        reference=reference_update,
        launch=launcher_update,
        configs=CONFIGS,
        dtypes=(torch.float32, torch.bfloat16),
        samples=(_update("sgd"), _update("sign")),
        limits="weights in float32 or bfloat16",
    ),
)
