"""RMSNorm and LayerNorm over the last dimension, forward and backward.

Letters: R rows, D features. ``y = (x - mean) rstd (offset + weight) + bias`` with ``rstd =
(mean((x - mean)^2) + eps)^-1/2``; RMSNorm (Zhang and Sennrich, 2019) has no mean and no bias,
Gemma's has ``offset`` 1. Everything between load and store is float32, rounded once. The backward
needs x and, per row, rstd (and mean), so y need not be kept.

One program holds a whole row. Weight gradients are summed over the rows of a program, then over
programs, in a fixed order; for rows of more than :data:`FUSED` features, whose sums would not stay
in registers, a second kernel forms them by columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxmem.kernels._triton import (
    Config,
    cdiv,
    config,
    jit,
    launch,
    power_of_2,
    processors,
    tl,
)
from fxmem.kernels.kernel import Cost, Kernel, Sample, signature
from fxmem.kernels.layout import rows_last

LARGEST = 32768  # features; a program holds a row in registers
FUSED = 8192


def reference(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float,
    center: bool = False,
    offset: float = 0.0,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``x [R, D]``, ``weight [D]``, ``bias [D]`` -> ``(y [R, D], rstd [R], mean [R] or None)``;
    ``center`` makes it a LayerNorm.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    z = x.to(wide)
    mean = z.mean(-1) if center else None
    z = z if mean is None else z - mean[:, None]
    rstd = torch.rsqrt((z * z).mean(-1) + eps)
    y = z * rstd[:, None]
    y = y if weight is None else y * (weight.to(wide) + offset)
    y = y if bias is None else y + bias.to(wide)
    return y.to(x.dtype), rstd, mean


def reference_backward(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor,
    mean: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    offset: float = 0.0,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Adds into ``dweight [D]``, ``dbias [D]`` where given; returns ``dx [R, D]``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    dy, z = dy.to(wide), x.to(wide)
    z = (z if mean is None else z - mean[:, None]) * rstd[:, None]
    if dweight is not None:
        dweight += (dy * z).sum(0)
    if dbias is not None:
        dbias += dy.sum(0)
    g = dy if weight is None else dy * (weight.to(wide) + offset)
    dx = g - z * (g * z).mean(-1, keepdim=True)
    dx = dx if mean is None else dx - g.mean(-1, keepdim=True)
    return (dx * rstd[:, None]).to(x.dtype)


@jit
def _forward(X, W, B, Y, RSTD, MEAN, x_r, eps, offset, D: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    x = tl.load(X + row * x_r + d, mask=inside, other=0.0).to(tl.float32)
    if MEAN is not None:
        mean = tl.sum(x, 0) / D
        tl.store(MEAN + row, mean)
        x = tl.where(inside, x - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(x * x, 0) / D + eps)
    tl.store(RSTD + row, rstd)
    y = x * rstd
    if W is not None:
        y = y * (tl.load(W + d, mask=inside, other=0.0).to(tl.float32) + offset)
    if B is not None:
        y += tl.load(B + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + row * D + d, y, mask=inside)


@jit
def _backward(
    DY, X, RSTD, MEAN, W, DX, DW, DB, rows, x_r, dy_r, offset,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64)  # and so is every row number of the loop
    step = tl.num_programs(0)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    dw = tl.zeros((BLOCK_D,), tl.float32)
    db = tl.zeros((BLOCK_D,), tl.float32)
    for row in range(first, rows, step):
        dy = tl.load(DY + row * dy_r + d, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(X + row * x_r + d, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + row)
        if MEAN is not None:
            z = tl.where(inside, z - tl.load(MEAN + row), 0.0)
        z = z * rstd
        dw += dy * z
        db += dy
        g = dy
        if W is not None:
            g = dy * (tl.load(W + d, mask=inside, other=0.0).to(tl.float32) + offset)
        dx = g - z * (tl.sum(g * z, 0) / D)
        if MEAN is not None:
            dx -= tl.sum(g, 0) / D
        tl.store(DX + row * D + d, dx * rstd, mask=inside)
    # Sums that are not asked for are dead code.
    if DW is not None:
        tl.store(DW + first * D + d, dw, mask=inside)
    if DB is not None:
        tl.store(DB + first * D + d, db, mask=inside)


@jit
def _dweight(
    DY, X, RSTD, MEAN, DW, DB, rows, x_r, dy_r, D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    dw = tl.zeros((BLOCK_C,), tl.float32)
    db = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(split * BLOCK_R, rows, tl.num_programs(1) * BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        inside = (r < rows)[:, None] & (c < D)[None, :]
        row = r[:, None].to(tl.int64)
        dy = tl.load(DY + row * dy_r + c[None, :], mask=inside, other=0.0).to(tl.float32)
        z = tl.load(X + row * x_r + c[None, :], mask=inside, other=0.0).to(tl.float32)
        if MEAN is not None:
            z = z - tl.load(MEAN + r, mask=r < rows, other=0.0)[:, None]
        z = z * tl.load(RSTD + r, mask=r < rows, other=0.0)[:, None]
        dw += tl.sum(dy * z, 0)
        db += tl.sum(dy, 0)
    if DW is not None:
        tl.store(DW + split * D + c, dw, mask=c < D)
    if DB is not None:
        tl.store(DB + split * D + c, db, mask=c < D)


COLUMNS = config(4, 2, R=32, C=64)
CONFIGS = (Config(4, 1), Config(8, 1), Config(16, 1))
_R = 2048


def choose(d: int) -> Config:
    """Warps that keep a row at 16 to 32 elements per thread."""
    return Config(max(1, min(16, power_of_2(d) // 512)), 1)


def _checked(x: Tensor) -> Tensor:
    if x.shape[-1] > LARGEST:
        raise ValueError(f"rows of {x.shape[-1]} features; the kernel holds at most {LARGEST}")
    return rows_last(x)


def launcher(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float,
    center: bool = False,
    offset: float = 0.0,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As :func:`reference`; at most :data:`LARGEST` features."""
    x, (r, d) = _checked(x), x.shape
    new: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    y, rstd = x.new_empty(r, d), torch.empty(r, **new)
    mean = torch.empty(r, **new) if center else None
    launch(
        _forward, (r,), config or choose(d), X=x, W=weight, B=bias, Y=y, RSTD=rstd, MEAN=mean,
        x_r=x.stride(0), eps=float(eps), offset=float(offset), D=d, BLOCK_D=power_of_2(d),
    )  # fmt: skip
    return y, rstd, mean


def launcher_backward(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor,
    mean: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    offset: float = 0.0,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """As :func:`reference_backward`."""
    x, dy, (r, d) = _checked(x), rows_last(dy), x.shape
    fused = d <= FUSED or (dweight is None and dbias is None)
    programs = min(r, 4 * processors(x.device))
    parts = programs if fused else min(cdiv(r, COLUMNS.blocks["BLOCK_R"]), 8)
    new: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    dw, db = (None if s is None else torch.empty(parts, d, **new) for s in (dweight, dbias))
    dx = x.new_empty(r, d)
    shared: dict[str, Any] = {
        "DY": dy, "X": x, "RSTD": rstd, "MEAN": mean, "rows": r, "x_r": x.stride(0),
        "dy_r": dy.stride(0), "D": d,
    }  # fmt: skip
    launch(
        _backward, (programs,), config or choose(d), **shared, W=weight, DX=dx,
        DW=dw if fused else None, DB=db if fused else None, offset=float(offset),
        BLOCK_D=power_of_2(d),
    )  # fmt: skip
    if not fused:
        grid = (cdiv(d, COLUMNS.blocks["BLOCK_C"]), parts)
        launch(_dweight, grid, COLUMNS, **shared, DW=dw, DB=db)
    if dweight is not None and dw is not None:
        dweight += dw.sum(0)
    if dbias is not None and db is not None:
        dbias += db.sum(0)
    return dx


def _operands(d: int) -> tuple[Tensor, Tensor, Tensor]:
    new: dict[str, Any] = {"device": "meta", "dtype": torch.bfloat16}
    return torch.empty(_R, d, **new), torch.empty(d, **new), torch.empty(_R, device="meta")


def _sample(d: int, center: bool) -> Sample:
    x, weight, _ = _operands(d)
    given = {"eps": 1e-6, "center": center}
    label = f"{'LayerNorm' if center else 'RMSNorm'}, R {_R}, D {d}"
    return Sample(label, lambda: ((x, weight), given), Cost(5 * _R * d, 4 * _R * d, False))


def _sample_backward(d: int, center: bool) -> Sample:
    x, weight, row = _operands(d)
    sums = {"dweight": torch.empty(d, device="meta")}
    if center:
        sums["dbias"] = torch.empty(d, device="meta")
    args = (x, x, row, row if center else None, weight)
    label = f"{'LayerNorm' if center else 'RMSNorm'}, R {_R}, D {d}"
    return Sample(label, lambda: (args, sums), Cost(11 * _R * d, 6 * _R * d, False))


KERNELS = (
    Kernel(
        name="norm",
        ops=("aten._fused_rms_norm.default", "aten.native_layer_norm.default"),
        signature=signature("r d, d, d -> r d, r, r", "d"),
        reference=reference,
        launch=launcher,
        configs=CONFIGS,
        samples=(_sample(4096, False), _sample(16384, True)),
        limits=f"at most {LARGEST} features",
    ),
    Kernel(
        name="norm_backward",
        ops=("aten._fused_rms_norm_backward.default", "aten.native_layer_norm_backward.default"),
        signature=signature("r d, r d, r, r, d -> r d, d, d", "d"),
        reference=reference_backward,
        launch=launcher_backward,
        configs=CONFIGS,
        samples=(_sample_backward(4096, False), _sample_backward(16384, True)),
        limits=f"at most {LARGEST} features; dweight and dbias in float32",
    ),
)
