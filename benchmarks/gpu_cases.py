"""Cases of the GPU benchmark: each kernel's operation by fxmem, PyTorch and rival libraries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_case import (
    Case,
    Implementation,
    Result,
    Setting,
    imported,
    ours,
    rival,
    with_gradients,
)
from fxmem.kernels._triton import Config
from fxmem.kernels.kernel import Cost
from fxmem.kernels.registry import find


def attention(s: Setting) -> Case:
    """The last chunk of a long sequence, forward and backward, grouped heads."""
    h, g, c, keys, e = (4, 2, 16, 48, 16) if s.small else (32, 8, 2048, 32768, 128)
    q, k, v = (s.rand(1, n, t, e, grad=True) for n, t in ((h, c), (g, keys), (g, keys)))
    dout = s.rand(1, h, c, e)
    given = {"scale": e**-0.5, "offset": keys - c}
    forward, backward = find("chunk_attention"), find("chunk_attention_backward")

    def make(config: Mapping[str, Config]) -> Implementation:
        def run() -> Result:
            x = tuple(t.detach() for t in (q, k, v))
            out, lse = forward(*x, **given)
            dk, dv = (torch.zeros_like(t, dtype=torch.float32) for t in x[1:])
            dq, _ = backward(dout, *x, out, lse, dk, dv, **given, **config)
            return out, dq, dk, dv

        return run

    def sdpa(bias: Any) -> Implementation:
        mask = bias(c, keys)
        return with_gradients(
            lambda *x: F.scaled_dot_product_attention(*x, attn_mask=mask, enable_gqa=True),
            (q, k, v), dout,
        )  # fmt: skip

    def dense(*x: Tensor) -> Tensor:
        rows = torch.arange(c, device=s.device)[:, None] + keys - c
        mask = torch.arange(keys, device=s.device) <= rows
        return F.scaled_dot_product_attention(*x, attn_mask=mask, enable_gqa=True)

    def flash(fn: Any) -> Implementation:
        def run(*x: Tensor) -> Tensor:
            return fn(*(t.transpose(1, 2) for t in x), causal=True).transpose(1, 2)

        return with_gradients(run, (q, k, v), dout)

    cost = Cost(18 * h * e * c * (keys - c / 2), 0)
    return Case(
        "attention", f"C {c}, S {keys}, E {e}",
        {
            **ours(s, "chunk_attention_backward", make),
            "torch, mask": with_gradients(dense, (q, k, v), dout),
            "torch, causal_lower_right": sdpa(
                imported("torch.nn.attention.bias", "causal_lower_right")
            ) if s.device.type == "cuda" else "CUDA only",
            "flash-attn": rival("flash_attn", "flash_attn_func", flash),
        },
        cost,
    )  # fmt: skip


def lm_head(s: Setting) -> Case:
    """Linear and mean cross-entropy of a chunk, forward and backward."""
    n, d, v = (24, 16, 96) if s.small else (4096, 4096, 128256)
    h, weight = s.rand(n, d, grad=True), s.rand(v, d, grad=True)
    target = torch.randint(v, (n,), device=s.device)
    forward = find("linear_nll")

    backward = find("linear_nll_backward")

    def make(config: Mapping[str, Config]) -> Implementation:
        def run() -> Result:
            x = (h.detach(), weight.detach(), None, target[:, None])
            logp, entropy, lse, _ = forward(*x)
            dw = torch.zeros_like(weight, dtype=torch.float32)
            dh = backward(*x, entropy, lse, torch.full_like(logp, -1 / n), dweight=dw, **config)
            return -logp.mean(), dh, dw

        return run

    def plain(h: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, weight).float(), target)

    def chunked(h: Tensor, weight: Tensor) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=1024, chunking_method=None)
        return F.linear_cross_entropy(h, weight, target, options=options)

    def liger(fn: Any) -> Implementation:
        return with_gradients(lambda h, w: fn.apply(h, w, target)[0], (h, weight))

    def cce(fn: Any) -> Implementation:
        return with_gradients(lambda h, w: fn(h, w, target, impl="cce_exact"), (h, weight))

    return Case(
        "LM head + loss", f"N {n}, D {d}, V {v}",
        {
            **ours(s, "linear_nll_backward", make),
            "torch": with_gradients(plain, (h, weight)),
            "torch, linear_cross_entropy": with_gradients(chunked, (h, weight)),
            "Liger": rival("liger_kernel.ops.fused_linear_cross_entropy",
                           "LigerFusedLinearCrossEntropyFunction", liger),
            "CCE": rival("cut_cross_entropy", "linear_cross_entropy", cce),
        },
        Cost(6 * n * d * v, 0),
    )  # fmt: skip


def rms_norm(s: Setting) -> Case:
    r, d = (16, 32) if s.small else (8192, 4096)
    x, weight, dy = s.rand(r, d, grad=True), s.rand(d, grad=True), s.rand(r, d)
    forward, backward = find("norm"), find("norm_backward")

    def make(config: Mapping[str, Config]) -> Implementation:
        def run() -> Result:
            a, w = x.detach(), weight.detach()
            y, rstd, _ = forward(a, w, eps=1e-6, **config)
            dw = torch.zeros(d, device=s.device)
            return y, backward(dy, a, rstd, None, w, dweight=dw, **config), dw

        return run

    def liger(fn: Any) -> Implementation:
        return with_gradients(lambda x, w: fn.apply(x, w, 1e-6), (x, weight), dy)

    return Case(
        "RMSNorm", f"R {r}, D {d}",
        {
            **ours(s, "norm", make),
            "torch": with_gradients(lambda x, w: F.rms_norm(x, (d,), w, 1e-6), (x, weight), dy),
            "Liger": rival("liger_kernel.ops.rms_norm", "LigerRMSNormFunction", liger),
        },
        Cost(16 * r * d, 5 * r * d * s.dtype.itemsize),
    )  # fmt: skip


def swiglu(s: Setting) -> Case:
    n, i = (16, 32) if s.small else (8192, 14336)
    gate, up, dout = s.rand(n, i, grad=True), s.rand(n, i, grad=True), s.rand(n, i)
    forward, backward = find("gated"), find("gated_backward")

    def make(config: Mapping[str, Config]) -> Implementation:
        def run() -> Result:
            x = (gate.detach(), up.detach())
            return (forward(*x, **config), *backward(dout, *x, **config)[:2])

        return run

    def liger(fn: Any) -> Implementation:
        return with_gradients(fn.apply, (gate, up), dout)

    return Case(
        "SwiGLU", f"N {n}, I {i}",
        {
            **ours(s, "gated", make),
            "torch": with_gradients(lambda g, u: F.silu(g) * u, (gate, up), dout),
            "Liger": rival("liger_kernel.ops.swiglu", "LigerSiLUMulFunction", liger),
        },
        Cost(20 * n * i, 8 * n * i * s.dtype.itemsize),
    )  # fmt: skip


def rotary(s: Setting) -> Case:
    h, t, e = (2, 16, 16) if s.small else (32, 8192, 128)
    x, cos, sin = s.rand(1, h, t, e), s.rand(1, t, e), s.rand(1, t, e)
    kernel = find("rotary")

    def plain() -> Result:
        turned = torch.cat([-x[..., e // 2 :], x[..., : e // 2]], -1)
        return (x * cos[:, None] + turned * sin[:, None],)

    return Case(
        "rotary", f"H {h}, T {t}, E {e}",
        {
            **ours(s, "rotary", lambda config: lambda: (kernel(x, cos, sin, **config),)),
            "torch": plain,
        },
        Cost(3 * x.numel(), 2 * x.numel() * s.dtype.itemsize),
    )  # fmt: skip


def weight_gradient(s: Setting) -> Case:
    """Into a float32 accumulator, which is cleared first so that runs can be compared."""
    n, o, i = (24, 16, 32) if s.small else (2048, 14336, 4096)
    dy, x = s.rand(n, o), s.rand(n, i)
    acc = torch.zeros(o, i, device=s.device)
    kernel = find("weight_grad")

    def plain() -> Result:
        return (acc.zero_().add_(dy.t() @ x),)

    def make(config: Mapping[str, Config]) -> Implementation:
        return lambda: (kernel(acc.zero_(), dy, x, **config),)

    return Case(
        "weight gradient", f"N {n}, O {o}, I {i}",
        {**ours(s, "weight_grad", make), "torch": plain},
        Cost(2 * n * o * i, 12 * o * i + s.dtype.itemsize * n * (o + i)),
    )  # fmt: skip


def adamw(s: Setting) -> Case:
    """Master, moments and 16-bit copy; state is set back before every step."""
    count = 1000 if s.small else 218_112_000
    start, grad = torch.randn(count, device=s.device), s.rand(count)
    kernel = find("adamw")

    def state() -> list[Tensor]:
        return [start.clone(), torch.zeros_like(start), torch.zeros_like(start)]

    def make(config: Mapping[str, Config]) -> Implementation:
        w, m, v = state()
        copy = torch.empty_like(grad)

        def run() -> Result:
            w.copy_(start), m.zero_(), v.zero_()
            kernel(w, grad, m, v, copy, step=1, lr=1e-2, **config)
            return w, copy

        return run

    def torchs() -> Implementation:
        w = torch.nn.Parameter(start.clone())
        copy = torch.empty_like(grad)
        fused = s.device.type == "cuda"
        optimizer = torch.optim.AdamW([w], lr=1e-2, weight_decay=0.0, fused=fused)

        def run() -> Result:
            with torch.no_grad():
                w.copy_(start)
                optimizer.state.clear()
                w.grad = grad.float()
                optimizer.step()
                copy.copy_(w)
            return w.detach(), copy

        return run

    return Case(
        "AdamW", f"{count} parameters",
        {**ours(s, "adamw", make), "torch": torchs()},
        Cost(14 * count, (20 + 2 * s.dtype.itemsize + 4) * count),
    )  # fmt: skip


CASES: dict[str, Callable[[Setting], Case]] = {
    "attention": attention,
    "lm-head": lm_head,
    "rms-norm": rms_norm,
    "swiglu": swiglu,
    "rotary": rotary,
    "weight-gradient": weight_gradient,
    "adamw": adamw,
}
