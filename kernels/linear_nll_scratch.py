"""Backward of :mod:`linear_nll` through a scratch of bounded width.

As :mod:`linear_nll_backward`, with another trade. That one keeps logits on chip, forms them twice,
and adds to dH and dW once per tile. This one goes over the vocabulary :data:`WIDTH` entries at a
time: the gradient of those logits is written to a scratch ``[N, WIDTH]`` in the dtype of h, and two
matrix products read it (:mod:`weight_grad`, adding in float32). Three products in place of four,
each accumulator read and written once per part, no atomics; the price is the scratch, 16 MiB for
1024 tokens in bfloat16 however large V is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxmem.kernels._nll_gradient import tile_arguments, tile_gradient
from fxmem.kernels._triton import Config, cdiv, config, jit, launch, tl
from fxmem.kernels.linear_nll import COST, D, N, V
from fxmem.kernels.linear_nll_backward import arguments, sums
from fxmem.kernels.linear_nll_backward import reference as reference
from fxmem.kernels.registry import Cost, Kernel, Sample, signature
from fxmem.kernels.weight_grad import launcher as add_product

WIDTH = 8192  # vocabulary entries per part


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


# Logits formed once and two products; the accumulator and the scratch written and read twice.
_COST = Cost(3 * COST.flops, 2 * COST.bytes + 8 * V * D + 6 * N * V)

KERNELS = (
    Kernel(
        name="linear_nll_scratch",
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
