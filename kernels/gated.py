"""Gated activations ``out = act(gate) * up``: SwiGLU and GeGLU (Shazeer, 2020), with backward.

Letters: N tokens, I features. ``act`` is ``"silu"``, ``"gelu"`` (by erf) or ``"gelu_tanh"``. The
backward reads gate and up only, and can write ``out`` again in the same pass, which the gradient of
the following projection needs, so the product is never kept between forward and backward. ``gate``
and ``up`` may be the two halves of one tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from fxmem.kernels._device import sigmoid, tanh
from fxmem.kernels._triton import Config, cdiv, config, jit, launch, tl
from fxmem.kernels.kernel import Cost, Kernel, Sample, signature
from fxmem.kernels.layout import rows_last

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def _activate(x: Tensor, act: str) -> Tensor:
    if act == "silu":
        return silu(x)
    return gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")


def reference(
    gate: Tensor, up: Tensor, *, act: str = "silu", config: Config | None = None
) -> Tensor:
    """``gate [N, I]``, ``up [N, I]`` -> ``[N, I]``."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (_activate(gate.to(wide), act) * up.to(wide)).to(gate.dtype)


def reference_backward(
    dout: Tensor,
    gate: Tensor,
    up: Tensor,
    *,
    act: str = "silu",
    again: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(dgate, dup, out or None)``, all ``[N, I]``; ``again``: the forward's result once more."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    with torch.enable_grad():
        x = gate.detach().to(wide).requires_grad_()
        y = _activate(x, act)
        (slope,) = torch.autograd.grad(y.sum(), x)
    y, d = y.detach(), dout.to(wide)
    out = (y * up.to(wide)).to(gate.dtype) if again else None
    return (d * up.to(wide) * slope).to(gate.dtype), (d * y).to(gate.dtype), out


@jit
def _activation(x, ACT: tl.constexpr):
    """Value and slope."""
    if ACT == "silu":
        s = sigmoid(x)
        return x * s, s * (1 + x * (1 - s))
    elif ACT == "gelu":
        cdf = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        return x * cdf, cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        t = tanh(inner)
        slope = 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
        return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * slope


@jit
def _forward(
    GATE, UP, OUT, gate_n, up_n, WIDTH: tl.constexpr, ACT: tl.constexpr, BLOCK_I: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    gate = tl.load(GATE + n * gate_n + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    up = tl.load(UP + n * up_n + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    y, _ = _activation(gate, ACT)
    tl.store(OUT + n * WIDTH + i, y * up, mask=i < WIDTH)


@jit
def _backward(
    DOUT, GATE, UP, DGATE, DUP, OUT, dout_n, gate_n, up_n,
    WIDTH: tl.constexpr, ACT: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    dout = tl.load(DOUT + n * dout_n + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    gate = tl.load(GATE + n * gate_n + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    up = tl.load(UP + n * up_n + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    y, slope = _activation(gate, ACT)
    tl.store(DGATE + n * WIDTH + i, dout * up * slope, mask=i < WIDTH)
    tl.store(DUP + n * WIDTH + i, dout * y, mask=i < WIDTH)
    if OUT is not None:
        tl.store(OUT + n * WIDTH + i, y * up, mask=i < WIDTH)


CONFIGS = (config(4, 1, I=1024), config(8, 1, I=2048), config(4, 1, I=512))


def _check(act: str) -> None:
    if act not in ACTIVATIONS:
        raise ValueError(f"activation {act!r} is not one of {', '.join(ACTIVATIONS)}")


def launcher(
    gate: Tensor, up: Tensor, *, act: str = "silu", config: Config | None = None
) -> Tensor:
    """As :func:`reference`."""
    _check(act)
    gate, up, (n, i) = rows_last(gate), rows_last(up), gate.shape
    out, config = gate.new_empty(n, i), config or CONFIGS[0]
    launch(
        _forward, (n, cdiv(i, config.blocks["BLOCK_I"])), config, GATE=gate, UP=up, OUT=out,
        gate_n=gate.stride(0), up_n=up.stride(0), WIDTH=i, ACT=act,
    )  # fmt: skip
    return out


def launcher_backward(
    dout: Tensor,
    gate: Tensor,
    up: Tensor,
    *,
    act: str = "silu",
    again: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As :func:`reference_backward`."""
    _check(act)
    dout, gate, up, (n, i) = rows_last(dout), rows_last(gate), rows_last(up), gate.shape
    dgate, dup = gate.new_empty(n, i), gate.new_empty(n, i)
    out, config = gate.new_empty(n, i) if again else None, config or CONFIGS[0]
    launch(
        _backward, (n, cdiv(i, config.blocks["BLOCK_I"])), config, DOUT=dout, GATE=gate, UP=up,
        DGATE=dgate, DUP=dup, OUT=out, dout_n=dout.stride(0), gate_n=gate.stride(0),
        up_n=up.stride(0), WIDTH=i, ACT=act,
    )  # fmt: skip
    return dgate, dup, out


_N, _I = 2048, 14336  # a chunk of the MLP of Llama 3 8B


def _sample(count: int, act: str, flops: int, **given: bool) -> Sample:
    x = torch.empty(_N, _I, device="meta", dtype=torch.bfloat16)
    moved = 2 * (3 if count == 2 else 6) * _N * _I
    return Sample(
        f"{act}, N {_N}, I {_I}", lambda: ((x,) * count, {"act": act, **given}),
        Cost(flops * _N * _I, moved, False),
    )  # fmt: skip


KERNELS = (
    Kernel(
        name="gated",
        ops=("aten.mul.Tensor",),
        signature=signature("n i, n i -> n i"),
        reference=reference,
        launch=launcher,
        configs=CONFIGS,
        samples=tuple(_sample(2, act, 6) for act in ACTIVATIONS),
    ),
    Kernel(
        name="gated_backward",
        ops=("aten.mul.Tensor",),
        signature=signature("n i, n i, n i -> n i, n i"),
        reference=reference_backward,
        launch=launcher_backward,
        configs=CONFIGS,
        samples=tuple(_sample(3, act, 14, again=True) for act in ACTIVATIONS),
    ),
)
