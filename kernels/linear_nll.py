"""The LM head and what losses need of its logits, per token, with no logits in memory.

Letters: N tokens, D features, V vocabulary, K selected entries per token. Logits are ``z = cap(h
W^T + bias) / temperature``, ``cap(x) = softcap tanh(x / softcap)`` where ``softcap`` > 0. Results,
float32:

- ``logp [N, K]``: log-probabilities of the entries ``target [N, K]`` (0 where the target is
  ``ignore_index``);
- ``entropy [N]`` of the distribution, ``lse [N]`` of the logits, ``mean [N]`` of the logits.

Cross-entropy, label smoothing and z-loss (:func:`token_loss`), policy ratios, preference losses,
entropy bonuses and distillation from a teacher's top K are plain functions of these small vectors,
so autograd handles them; :mod:`linear_nll_backward` takes their gradients back to h, W and bias. A
token whose targets are all ignored gives zeros everywhere.

Tiles of logits live in registers and are reduced at once (Cut Cross-Entropy, Wijmans et al., 2024).
The vocabulary is split into at most ``SPLITS`` parts, so that few tokens still fill the device;
what is written is 4 + K numbers per token and part, however large V is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fxmem.kernels._device import tanh
from fxmem.kernels._triton import (
    Config,
    cdiv,
    config,
    dot_precision,
    jit,
    launch,
    processors,
    tl,
)
from fxmem.kernels.kernel import Cost, Kernel, Sample, signature
from fxmem.kernels.layout import rows_last

SPLITS = 32
TILE = 4096  # vocabulary entries per step of the reference
Scores = tuple[Tensor, Tensor, Tensor, Tensor]


def logits_tile(
    h: Tensor, weight: Tensor, bias: Tensor | None, softcap: float, temperature: float
) -> Tensor:
    """Logits of some vocabulary rows in float32 (or float64); for references only."""
    wide = torch.promote_types(h.dtype, torch.float32)
    z = h.to(wide) @ weight.to(wide).t()
    z = z if bias is None else z + bias
    z = softcap * torch.tanh(z / softcap) if softcap else z
    return z / temperature


def reference(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float = 0.0,
    temperature: float = 1.0,
    config: Config | None = None,
) -> Scores:
    """``h [N, D]``, ``weight [V, D]``, ``bias [V]``, ``target [N, K]`` int64 -> ``(logp [N, K],
    entropy [N], lse [N], mean [N])``. Tiled over the vocabulary, so memory does not grow with it.
    """
    n, v = h.shape[0], weight.shape[0]
    wide = torch.promote_types(h.dtype, torch.float32)
    lse = h.new_full((n,), -math.inf, dtype=wide)
    weighted, total = h.new_zeros(n, dtype=wide), h.new_zeros(n, dtype=wide)
    picked = h.new_zeros(target.shape, dtype=wide)
    for a in range(0, v, TILE):
        part = None if bias is None else bias[a : a + TILE]
        z = logits_tile(h, weight[a : a + TILE], part, softcap, temperature)
        new = torch.logaddexp(lse, torch.logsumexp(z, 1))
        scaled = torch.exp(z - new[:, None]).mul_(z).sum(1)
        weighted = weighted * torch.exp(lse - new) + scaled
        total, lse = total + z.sum(1), new
        inside = (target >= a) & (target < a + z.shape[1])
        found = z.gather(1, (target - a).clamp(0, z.shape[1] - 1))
        picked = torch.where(inside, found, picked)
    return finish(picked, lse, lse - weighted, total / v, target, ignore_index)


def finish(
    picked: Tensor, lse: Tensor, entropy: Tensor, mean: Tensor, target: Tensor, ignore_index: int
) -> Scores:
    """Log-probabilities from logits, and zeros for what is ignored."""
    ignored = target == ignore_index
    dead = ignored.all(1)
    logp = (picked - lse[:, None]).masked_fill(ignored, 0)
    return logp, *(x.masked_fill(dead, 0) for x in (entropy, lse, mean))  # type: ignore[return-value]


def token_loss(
    logp: Tensor, lse: Tensor, mean: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> Tensor:
    """Cross-entropy per token ``[N]`` of the single target (K = 1), differentiable.

    With smoothing e: ``(1 - e) (-logp) + e (lse - mean)``, as ``F.cross_entropy`` (Szegedy et al.,
    2015, section 7); z-loss adds ``z_loss lse^2`` (PaLM, Chowdhery et al., 2022, section 5).
    """
    loss = -(1 - label_smoothing) * logp.squeeze(1) + label_smoothing * (lse - mean)
    return loss + z_loss * lse * lse


@jit
def tile_logits(
    H, W, BIAS, n, v, rows, vocabulary, h_n, w_v, softcap, inverse_temperature,
    D: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Logits of a tile before the temperature, capped; 0 outside the matrix."""
    z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    n_at = n[:, None].to(tl.int64) * h_n
    v_at = v[None, :].to(tl.int64) * w_v
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        h = tl.load(H + n_at + d[None, :], (n < rows)[:, None] & (d < D)[None, :], 0.0)
        w = tl.load(W + v_at + d[:, None], (v < vocabulary)[None, :] & (d < D)[:, None], 0.0)
        z = tl.dot(h, w, z, input_precision=PRECISION)
    if BIAS is not None:
        z += tl.load(BIAS + v, mask=v < vocabulary, other=0.0).to(tl.float32)[None, :]
    if SOFTCAP:
        z = softcap * tanh(z / softcap)
    return z


@jit
def _forward(
    H, W, BIAS, TARGET, TOP, SUM, WEIGHTED, TOTAL, PICKED,
    rows, vocabulary, per_split, h_n, w_v, softcap, inverse_temperature,
    K: tl.constexpr, D: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    row = n < rows
    at = split * rows + n
    top = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    sums = tl.zeros((BLOCK_N,), tl.float32)
    weighted = tl.zeros((BLOCK_N,), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(split * per_split, tl.minimum((split + 1) * per_split, vocabulary), BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z = tile_logits(
            H, W, BIAS, n, v, rows, vocabulary, h_n, w_v, softcap, inverse_temperature,
            D, SOFTCAP, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D,
        ) * inverse_temperature  # fmt: skip
        inside = (v < vocabulary)[None, :]
        new = tl.maximum(top, tl.max(tl.where(inside, z, -float("inf")), 1))
        p = tl.where(inside, tl.exp(z - new[:, None]), 0.0)
        keep = tl.exp(top - new)
        sums = sums * keep + tl.sum(p, 1)
        weighted = weighted * keep + tl.sum(p * z, 1)
        total += tl.sum(tl.where(inside, z, 0.0), 1)
        top = new
        for j in range(K):
            target = tl.load(TARGET + n.to(tl.int64) * K + j, mask=row, other=-1)
            hit = target[:, None] == v[None, :]
            here = row & (target >= start) & (target < start + BLOCK_V)
            tl.store(PICKED + at * K + j, tl.sum(tl.where(hit, z, 0.0), 1), mask=here)
    tl.store(TOP + at, top, mask=row)
    tl.store(SUM + at, sums, mask=row)
    tl.store(WEIGHTED + at, weighted, mask=row)
    tl.store(TOTAL + at, total, mask=row)


CONFIGS = (
    config(8, 3, N=64, V=128, D=64),
    config(8, 2, N=128, V=128, D=32),
    config(4, 2, N=64, V=64, D=64),
    config(8, 2, N=64, V=128, D=16),
)


def choose(dtype: torch.dtype) -> Config:
    """The default configuration: the widest that spills nothing."""
    return CONFIGS[3] if dtype == torch.float32 else CONFIGS[0]


def splits(tokens: int, vocabulary: int, config: Config, device: torch.device) -> tuple[int, int]:
    """``(parts, entries per part)``: two programs per processor, at most :data:`SPLITS` parts."""
    blocks = cdiv(vocabulary, config.blocks["BLOCK_V"])
    programs = cdiv(tokens, config.blocks["BLOCK_N"])
    wanted = cdiv(2 * processors(device), max(programs, 1))
    each = cdiv(blocks, max(1, min(wanted, SPLITS, blocks))) * config.blocks["BLOCK_V"]
    return cdiv(vocabulary, each), each


def launcher(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float = 0.0,
    temperature: float = 1.0,
    config: Config | None = None,
) -> Scores:
    """As :func:`reference`."""
    (n, d), v, k = h.shape, weight.shape[0], target.shape[1]
    h, weight, target = rows_last(h), rows_last(weight), target.contiguous()
    config = config or choose(h.dtype)
    parts, each = splits(n, v, config, h.device)
    new: dict[str, Any] = {"dtype": torch.float32, "device": h.device}
    top, sums, weighted, total = (torch.empty(parts, n, **new) for _ in range(4))
    picked = torch.zeros(parts, n, k, **new)
    launch(
        _forward, (cdiv(n, config.blocks["BLOCK_N"]), parts), config,
        H=h, W=weight, BIAS=bias, TARGET=target, TOP=top, SUM=sums, WEIGHTED=weighted,
        TOTAL=total, PICKED=picked, rows=n, vocabulary=v, per_split=each, h_n=h.stride(0),
        w_v=weight.stride(0), softcap=float(softcap), inverse_temperature=1.0 / temperature,
        K=k, D=d, SOFTCAP=softcap > 0, PRECISION=dot_precision(h.dtype),
    )  # fmt: skip
    most = top.amax(0)
    rescale = torch.exp(top - most)
    sums, weighted = (sums * rescale).sum(0), (weighted * rescale).sum(0)
    lse = most + torch.log(sums)
    # A target lies in one part; the others hold zeros.
    return finish(picked.sum(0), lse, lse - weighted / sums, total.sum(0) / v, target, ignore_index)


N, D, V = 1024, 4096, 128256  # a chunk of Llama 3 8B


def operands(
    k: int = 1, bias: bool = False, dtype: torch.dtype = torch.bfloat16
) -> tuple[Any, ...]:
    """``h, weight, bias, target`` on the meta device."""
    new: dict[str, Any] = {"device": "meta", "dtype": dtype}
    given = torch.empty(V, **new) if bias else None
    target = torch.empty(N, k, device="meta", dtype=torch.int64)
    return torch.empty(N, D, **new), torch.empty(V, D, **new), given, target


COST = Cost(2 * N * D * V, 2 * (N * D + V * D) + 4 * N * 8)

KERNELS = (
    Kernel(
        name="linear_nll",
        ops=("fxmem.token_nll.default",),
        signature=signature("n d, v d, v, n k -> n k, n, n, n", "v d k"),
        reference=reference,
        launch=launcher,
        configs=CONFIGS,
        samples=(
            Sample("N 1024, D 4096, V 128256", lambda: (operands(), {}), COST),
            Sample(
                "bias, softcap, K 8",
                lambda: (operands(8, True), {"softcap": 30.0, "temperature": 0.7}),
                COST,
            ),
            Sample("float32", lambda: (operands(1, False, torch.float32), {}), COST, torch.float32),
        ),
    ),
)
