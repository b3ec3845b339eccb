"""Backward of :mod:`linear_nll`: gradients of h, W and bias, with no logits in memory.

Letters as in the forward. Tiles of logits are formed again, see :mod:`_nll_gradient`. dW has one
owner per vocabulary block and is added into the caller's float32 accumulator without atomics. dH is
a sum over the vocabulary: parts of it add atomically, or, where
``torch.use_deterministic_algorithms`` is set, one program goes over the whole vocabulary. Each tile
reads and writes its rows of dW, so large N means much traffic: see :mod:`linear_nll_scratch`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxmem.kernels._nll_gradient import coefficients, tile_arguments, tile_gradient
from fxmem.kernels._triton import Config, cdiv, config, jit, launch, tl
from fxmem.kernels.linear_nll import COST, D, N, V, operands, splits
from fxmem.kernels.registry import Cost, Kernel, Sample, signature

TILE = 4096  # vocabulary entries per step of the reference


def reference(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    entropy: Tensor,
    lse: Tensor,
    dlogp: Tensor | None,
    dentropy: Tensor | None = None,
    dlse: Tensor | None = None,
    dmean: Tensor | None = None,
    *,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
    need_dh: bool = True,
    ignore_index: int = -100,
    softcap: float = 0.0,
    temperature: float = 1.0,
    config: Config | None = None,
) -> Tensor | None:
    """Adds into ``dweight [V, D]`` and ``dbias [V]`` where given; returns ``dh [N, D]``.

    ``entropy``, ``lse`` from the forward; gradients ``dlogp [N, K]``, the others ``[N]``.
    """
    a, bcm = coefficients(
        target, entropy, dlogp, dentropy, dlse, dmean, weight.shape[0], ignore_index
    )
    b, c, m = (x[:, None] for x in bcm)
    wide = torch.promote_types(h.dtype, torch.float32)
    dh = torch.zeros_like(h, dtype=wide)
    for lo in range(0, weight.shape[0], TILE):
        w = weight[lo : lo + TILE].to(wide)
        z = h.to(wide) @ w.t()
        z = z if bias is None else z + bias[lo : lo + TILE]
        z = softcap * torch.tanh(z / softcap) if softcap else z
        log_p = z / temperature - lse[:, None]
        dz = torch.exp(log_p) * (b + c * log_p) + m
        inside = (target >= lo) & (target < lo + w.shape[0])
        at = (target - lo).clamp(0, w.shape[0] - 1)
        dz = dz.scatter_add(1, at, a.masked_fill(~inside, 0)) / temperature
        dz = dz * (1 - (z / softcap) ** 2) if softcap else dz
        if dweight is not None:
            dweight[lo : lo + TILE] += dz.t() @ h.to(wide)
        if dbias is not None:
            dbias[lo : lo + TILE] += dz.sum(0)
        if need_dh:
            dh += dz @ w
    return dh.to(h.dtype) if need_dh else None


@jit
def _dweight(
    H, W, BIAS, TARGET, A, BCM, LSE, DW, DB,
    rows, vocabulary, h_n, w_v, dw_v, softcap, inverse_temperature,
    K: tl.constexpr, D: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    bias_sum = tl.zeros((BLOCK_V,), tl.float32)
    for first in range(0, rows, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        dz = tile_gradient(
            H, W, BIAS, TARGET, A, BCM, LSE, n, v, rows, vocabulary, h_n, w_v, softcap,
            inverse_temperature, K, D, SOFTCAP, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        bias_sum += tl.sum(dz, 0)
        if DW is not None:
            dz_t = tl.trans(dz.to(H.dtype.element_ty))
            for start in range(0, D, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                h_at = H + n[:, None].to(tl.int64) * h_n + d[None, :]
                h = tl.load(h_at, (n < rows)[:, None] & (d < D)[None, :], 0.0)
                inside = (v < vocabulary)[:, None] & (d < D)[None, :]
                at = DW + v[:, None].to(tl.int64) * dw_v + d[None, :]
                part = tl.dot(dz_t, h, input_precision=PRECISION)
                tl.store(at, tl.load(at, mask=inside, other=0.0) + part, mask=inside)
            tl.debug_barrier()  # the next rows read what other threads of the program wrote
    if DB is not None:
        at = DB + v
        old = tl.load(at, mask=v < vocabulary, other=0.0)
        tl.store(at, old + bias_sum, mask=v < vocabulary)


@jit
def _dh(
    H, W, BIAS, TARGET, A, BCM, LSE, DH,
    rows, vocabulary, per_split, h_n, w_v, softcap, inverse_temperature, ATOMIC: tl.constexpr,
    K: tl.constexpr, D: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    for first in range(split * per_split, tl.minimum((split + 1) * per_split, vocabulary), BLOCK_V):
        v = first + tl.arange(0, BLOCK_V)
        dz = tile_gradient(
            H, W, BIAS, TARGET, A, BCM, LSE, n, v, rows, vocabulary, h_n, w_v, softcap,
            inverse_temperature, K, D, SOFTCAP, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D,
        ).to(W.dtype.element_ty)  # fmt: skip
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            w_at = W + v[:, None].to(tl.int64) * w_v + d[None, :]
            w = tl.load(w_at, (v < vocabulary)[:, None] & (d < D)[None, :], 0.0)
            part = tl.dot(dz, w, input_precision=PRECISION)
            at = DH + n[:, None].to(tl.int64) * D + d[None, :]
            inside = (n < rows)[:, None] & (d < D)[None, :]
            if ATOMIC:
                tl.atomic_add(at, part, mask=inside, sem="relaxed")
            else:
                tl.store(at, tl.load(at, mask=inside, other=0.0) + part, mask=inside)
        if not ATOMIC:
            tl.debug_barrier()  # the next entries read what other threads of the program wrote


CONFIGS = (
    config(8, 2, N=64, V=64, D=64),
    config(8, 2, N=64, V=128, D=32),
    config(8, 3, N=128, V=128, D=32),
    config(8, 2, N=64, V=64, D=16),
)


def choose(dtype: torch.dtype) -> Config:
    """The default configuration: the widest that spills nothing."""
    return CONFIGS[3] if dtype == torch.float32 else CONFIGS[0]


def launcher(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    entropy: Tensor,
    lse: Tensor,
    dlogp: Tensor | None,
    dentropy: Tensor | None = None,
    dlse: Tensor | None = None,
    dmean: Tensor | None = None,
    *,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
    need_dh: bool = True,
    ignore_index: int = -100,
    softcap: float = 0.0,
    temperature: float = 1.0,
    config: Config | None = None,
) -> Tensor | None:
    """As :func:`reference`; ``dweight``, ``dbias`` are float32, ``dweight`` has contiguous rows."""
    config = config or choose(h.dtype)
    shared = tile_arguments(
        h, weight, bias, target, entropy, lse, (dlogp, dentropy, dlse, dmean), ignore_index,
        softcap, temperature,
    )  # fmt: skip
    (n, d), v = h.shape, weight.shape[0]
    shared["vocabulary"] = v
    if dweight is not None or dbias is not None:
        stride = 0 if dweight is None else dweight.stride(0)
        grid = (cdiv(v, config.blocks["BLOCK_V"]), 1)
        launch(_dweight, grid, config, **shared, DW=dweight, DB=dbias, dw_v=stride)
    if not need_dh:
        return None
    dh = torch.zeros(n, d, dtype=torch.float32, device=h.device)
    parts, each = splits(n, v, config, h.device)
    if torch.are_deterministic_algorithms_enabled():
        parts, each = 1, v
    grid = (cdiv(n, config.blocks["BLOCK_N"]), parts)
    launch(_dh, grid, config, **shared, DH=dh, per_split=each, ATOMIC=parts > 1)
    return dh.to(h.dtype)


def arguments(k: int, bias: bool, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    """Operands of the backward on the meta device."""
    row, wide = torch.empty(N, device="meta"), torch.empty(N, k, device="meta")
    return (*operands(k, bias, dtype), row, row, wide)


def sums() -> dict[str, Any]:
    """Accumulators on the meta device."""
    return {"dweight": torch.empty(V, D, device="meta"), "dbias": torch.empty(V, device="meta")}


# Two products, and the logits formed twice; h and W read by both, the accumulator read and written.
_COST = Cost(4 * COST.flops, 2 * COST.bytes + 8 * V * D)

KERNELS = (
    Kernel(
        name="linear_nll_backward",
        ops=("fxmem.token_nll_backward.default",),
        signature=signature("n d, v d, v, n k, n, n, n k, n, n, n -> n d, v d, v", "v d k"),
        reference=reference,
        launch=launcher,
        configs=CONFIGS,
        samples=(
            Sample("N 1024, D 4096, V 128256", lambda: (arguments(1, False), sums()), _COST),
            Sample(
                "bias, softcap, K 8",
                lambda: (arguments(8, True), {"softcap": 30.0, "temperature": 0.7, **sums()}),
                _COST,
            ),
            Sample(
                "float32",
                lambda: (arguments(1, False, torch.float32), sums()),
                _COST,
                torch.float32,
            ),
        ),
        limits="dweight and dbias in float32",
    ),
)
