"""Rotary position embedding (Su et al., 2021), and its transpose for the backward.

Letters: B batch, H heads, T tokens, E head size, R rotated part (R <= E, even; the rest passes).
Pairs are ``(j, j + R/2)``, or ``(2j, 2j + 1)`` where ``interleaved``. As in transformers, ``y = x
cos + rotate(x) sin`` with ``cos`` and ``sin`` given for all R positions; the two halves need
not be equal. The map is linear in x, so ``transpose`` is the backward and nothing is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxmem.kernels._triton import Config, cdiv, config, jit, launch, power_of_2, tl
from fxmem.kernels.kernel import Cost, Kernel, Sample, signature
from fxmem.kernels.layout import rows_last


def _pairs(r: int, interleaved: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    j = torch.arange(r // 2, device=device)
    return (2 * j, 2 * j + 1) if interleaved else (j, j + r // 2)


def reference(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    transpose: bool = False,
    config: Config | None = None,
) -> Tensor:
    """``x [B, H, T, E]``, ``cos`` and ``sin`` ``[B|1, T, R]`` -> ``[B, H, T, E]``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    a, b = _pairs(cos.shape[-1], interleaved, x.device)
    c, s = cos.to(wide)[:, None], sin.to(wide)[:, None]
    z = x.to(wide)
    u, v = z[..., a], z[..., b]
    out = z.clone()
    if transpose:
        out[..., a] = u * c[..., a] + v * s[..., b]
        out[..., b] = v * c[..., b] - u * s[..., a]
    else:
        out[..., a] = u * c[..., a] - v * s[..., a]
        out[..., b] = v * c[..., b] + u * s[..., b]
    return out.to(x.dtype)


@jit
def _rotary(
    X, COS, SIN, OUT, x_b, x_h, x_t, c_b, c_t, s_b, s_t, heads, tokens,
    E: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, TRANSPOSE: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = tl.program_id(1) % heads
    j = tl.arange(0, BLOCK_J)
    if INTERLEAVED:
        first = 2 * j
        second = 2 * j + 1
    else:
        first = j
        second = j + R // 2
    row = t[:, None].to(tl.int64)
    inside = (t < tokens)[:, None] & (j < R // 2)[None, :]
    x_at = X + b * x_b + h * x_h + row * x_t
    c_at = COS + b * c_b + row * c_t
    s_at = SIN + b * s_b + row * s_t
    out_at = OUT + (tl.program_id(1).to(tl.int64) * tokens + row) * E
    u = tl.load(x_at + first[None, :], mask=inside, other=0.0).to(tl.float32)
    v = tl.load(x_at + second[None, :], mask=inside, other=0.0).to(tl.float32)
    c0 = tl.load(c_at + first[None, :], mask=inside, other=0.0).to(tl.float32)
    c1 = tl.load(c_at + second[None, :], mask=inside, other=0.0).to(tl.float32)
    s0 = tl.load(s_at + first[None, :], mask=inside, other=0.0).to(tl.float32)
    s1 = tl.load(s_at + second[None, :], mask=inside, other=0.0).to(tl.float32)
    if TRANSPOSE:
        tl.store(out_at + first[None, :], u * c0 + v * s1, mask=inside)
        tl.store(out_at + second[None, :], v * c1 - u * s0, mask=inside)
    else:
        tl.store(out_at + first[None, :], u * c0 - v * s0, mask=inside)
        tl.store(out_at + second[None, :], v * c1 + u * s1, mask=inside)
    if R < E:
        p = R + tl.arange(0, BLOCK_P)
        rest = (t < tokens)[:, None] & (p < E)[None, :]
        tl.store(out_at + p[None, :], tl.load(x_at + p[None, :], mask=rest, other=0.0), mask=rest)


CONFIGS = (config(4, 1, T=32), config(4, 1, T=16), config(8, 1, T=64))


def launcher(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    transpose: bool = False,
    config: Config | None = None,
) -> Tensor:
    """As :func:`reference`; ``x`` may have any strides but the last."""
    (b, h, t, e), r = x.shape, cos.shape[-1]
    if r % 2 or r > e:
        raise ValueError(f"the rotated part {r} must be even and at most the head size {e}")
    x, cos, sin = (rows_last(y) for y in (x, cos, sin))
    cos, sin = (y.expand(b, t, r) for y in (cos, sin))
    out, config = x.new_empty(b, h, t, e), config or CONFIGS[0]
    strides = dict(zip(("x_b", "x_h", "x_t"), x.stride(), strict=False))
    launch(
        _rotary, (cdiv(t, config.blocks["BLOCK_T"]), b * h), config, X=x, COS=cos, SIN=sin,
        OUT=out, **strides, c_b=cos.stride(0), c_t=cos.stride(1), s_b=sin.stride(0),
        s_t=sin.stride(1), heads=h, tokens=t, E=e, R=r, INTERLEAVED=interleaved,
        TRANSPOSE=transpose, BLOCK_J=power_of_2(r // 2), BLOCK_P=power_of_2(e - r),
    )  # fmt: skip
    return out


def _sample(e: int, r: int, **given: bool) -> Sample:
    new: dict[str, Any] = {"device": "meta", "dtype": torch.bfloat16}
    x, table = torch.empty(1, 32, 2048, e, **new), torch.empty(1, 2048, r, **new)
    cost = Cost(3 * x.numel() * r / e, 4 * x.numel() + 4 * table.numel(), False)
    return Sample(f"H 32, T 2048, E {e}, R {r}", lambda: ((x, table, table), given), cost)


KERNELS = (
    Kernel(
        name="rotary",
        ops=("aten.add.Tensor", "aten.cat.default"),
        signature=signature("b h t e, b t r, b t r -> b h t e", "e r"),
        reference=reference,
        launch=launcher,
        configs=CONFIGS,
        samples=(
            _sample(128, 128),
            _sample(128, 128, transpose=True),
            _sample(80, 20, interleaved=True),
        ),
    ),
)
