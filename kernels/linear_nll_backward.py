"""Backward of :mod:`linear_nll`: gradients of h, W and bias, with logits in a bounded scratch only.

Letters as in the forward. The vocabulary is walked :data:`WIDTH` entries at a time: the gradient
of those logits (see :mod:`_nll_gradient`) is written to a scratch ``[N, WIDTH]`` in the dtype of h,
and two matrix products read it (:mod:`weight_grad`, adding in float32). Each accumulator is read
and written once per part, without atomics; the price is the scratch, 16 MiB for 1024 tokens in
bfloat16 however large V is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxmem.kernels._nll_gradient import coefficients, tile_arguments, tile_gradient
from fxmem.kernels._triton import Config, cdiv, config, jit, launch, tl
from fxmem.kernels.kernel import Cost, Kernel, Sample, signature
from fxmem.kernels.linear_nll import COST, D, N, V, operands
from fxmem.kernels.weight_grad import launcher as add_product

TILE = 4096  # vocabulary entries per step of the reference
WIDTH = 8192  # vocabulary entries per part of the kernel


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
def _dlogits(
    H, W, BIAS, TARGET, A, BCM, LSE, DZ, first, last, rows, h_n, w_v, softcap, inverse_temperature,
    K: tl.constexpr, D: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    v = first + tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    dz = tile_gradient(
        H, W, BIAS, TARGET, A, BCM, LSE, n, v, rows, last, h_n, w_v, softcap,
        inverse_temperature, K, D, SOFTCAP, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    at = DZ + n[:, None].to(tl.int64) * (last - first) + (v - first)[None, :]
    tl.store(at, dz.to(DZ.dtype.element_ty), mask=(n < rows)[:, None] & (v < last)[None, :])


CONFIGS = (
    config(8, 3, N=64, V=128, D=64),
    config(8, 2, N=128, V=128, D=32),
    config(8, 2, N=64, V=64, D=16),
)


def choose(dtype: torch.dtype) -> Config:
    """The default configuration: the widest that spills nothing."""
    return CONFIGS[2] if dtype == torch.float32 else CONFIGS[0]


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
    scratch = h.new_empty(n * min(v, WIDTH))
    dh = torch.zeros(n, d, dtype=torch.float32, device=h.device) if need_dh else None
    for first in range(0, v, WIDTH):
        last = min(first + WIDTH, v)
        dz = scratch[: n * (last - first)].view(n, last - first)
        grid = (cdiv(n, config.blocks["BLOCK_N"]), cdiv(last - first, config.blocks["BLOCK_V"]))
        launch(_dlogits, grid, config, **shared, DZ=dz, first=first, last=last)
        if dweight is not None:
            add_product(dweight[first:last], dz, h)
        if dbias is not None:
            dbias[first:last] += dz.sum(0, dtype=torch.float32)
        if dh is not None:
            add_product(dh, dz.t(), weight[first:last])
    return None if dh is None else dh.to(h.dtype)


def arguments(k: int, bias: bool, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    """Operands of the backward on the meta device."""
    row, wide = torch.empty(N, device="meta"), torch.empty(N, k, device="meta")
    return (*operands(k, bias, dtype), row, row, wide)


def sums() -> dict[str, Any]:
    """Accumulators on the meta device."""
    return {"dweight": torch.empty(V, D, device="meta"), "dbias": torch.empty(V, device="meta")}


# Logits formed once and two products; the accumulator and the scratch written and read twice.
_COST = Cost(3 * COST.flops, 2 * COST.bytes + 8 * V * D + 6 * N * V)

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
