"""AdamW (Loshchilov and Hutter, 2017, algorithm 2) on the active block, in one pass over memory.

The float32 master weight, both moments and the gradient are read once; master, moments and the
16-bit copy that the model computes with are written once. Where the parameter itself is float32
there is no copy. Without the fusion, torch's optimizer plus the casts move about twice the bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxmem.kernels._triton import Config, cdiv, jit, launch, tl
from fxmem.kernels.kernel import Cost, Kernel, Sample, signature


def reference(
    master: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    copy: Tensor | None = None,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    config: Config | None = None,
) -> None:
    """Updates ``master``, ``m``, ``v`` (float32) and ``copy`` (any float) in place; ``step`` counts
    from 1. ``grad`` is of any float type.
    """
    g = grad.to(master.dtype)
    master.mul_(1 - lr * weight_decay)
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = v.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    master.addcdiv_(m, denominator, value=-lr / (1 - beta1**step))
    if copy is not None:
        copy.copy_(master)


@jit
def _adamw(
    MASTER, GRAD, M, V, COPY, count, shrink, rate, beta1, beta2, rest1, rest2, eps, root,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(GRAD + at, mask=inside, other=0.0).to(tl.float32)
    m = beta1 * tl.load(M + at, mask=inside, other=0.0) + rest1 * g
    v = beta2 * tl.load(V + at, mask=inside, other=0.0) + rest2 * g * g
    w = tl.load(MASTER + at, mask=inside, other=0.0) * shrink
    w = w - rate * (m / (tl.sqrt(v) * root + eps))
    tl.store(M + at, m, mask=inside)
    tl.store(V + at, v, mask=inside)
    tl.store(MASTER + at, w, mask=inside)
    if COPY is not None:
        tl.store(COPY + at, w.to(COPY.dtype.element_ty), mask=inside)


CONFIGS = (
    Config(4, 1, {"BLOCK": 1024}),
    Config(8, 1, {"BLOCK": 2048}),
    Config(4, 1, {"BLOCK": 512}),
)


def launcher(
    master: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    copy: Tensor | None = None,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    config: Config | None = None,
) -> None:
    """As :func:`reference`, which runs where a tensor that is written is not contiguous."""
    written = [master, m, v] + ([] if copy is None else [copy])
    if not all(x.is_contiguous() for x in written):
        return reference(
            master, grad, m, v, copy, step=step, lr=lr, beta1=beta1, beta2=beta2, eps=eps,
            weight_decay=weight_decay,
        )  # fmt: skip
    config = config or CONFIGS[0]
    launch(
        _adamw, (cdiv(master.numel(), config.blocks["BLOCK"]),), config, MASTER=master,
        GRAD=grad.contiguous(), M=m, V=v, COPY=copy, count=master.numel(),
        shrink=1.0 - lr * weight_decay, rate=lr / (1.0 - beta1**step), beta1=float(beta1),
        beta2=float(beta2), rest1=1.0 - beta1, rest2=1.0 - beta2, eps=float(eps),
        root=(1.0 - beta2**step) ** -0.5,
    )  # fmt: skip


def _arguments() -> tuple[tuple[Any, ...], dict[str, Any]]:
    wide = torch.empty(_COUNT, device="meta")
    half = wide.to(torch.bfloat16)
    return (wide, half, wide, wide, half), {"step": 10, "lr": 1e-4, "weight_decay": 0.1}


_COUNT = 218_112_000  # one decoder layer of Llama 3 8B

KERNELS = (
    Kernel(
        name="adamw",
        ops=(),
        signature=signature("p, p, p, p, p -> p, p, p, p"),
        reference=reference,
        launch=launcher,
        configs=CONFIGS,
        samples=(Sample("one layer of 8B", _arguments, Cost(14 * _COUNT, 28 * _COUNT, False)),),
        limits="master and moments in float32",
    ),
)
