"""What people write on a streamed value: ``x [B, T, D]`` (D is 8) and ``ids [B, T]`` in, a tensor
out. By what comes out: the same shape, something per token, or anything.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

D, VOCAB = 8, 13
Word = Callable[[Tensor, Tensor], Tensor]


def _written(x: Tensor, ids: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = 0.5
    y[..., 1] = y[..., 2]
    return y


def _rotated(x: Tensor, ids: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turn = torch.polar(torch.ones(4, dtype=x.dtype), torch.arange(4, dtype=x.dtype))
    return torch.view_as_real(pairs * turn).flatten(-2)


def _scored(x: Tensor, ids: Tensor) -> Tensor:
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return (x @ x.transpose(1, 2)).masked_fill(later, -1e9).softmax(-1) @ x


def _blocks(x: Tensor, size: int) -> Tensor:
    """``[B, blocks, size, D]``, padded to whole ones."""
    return F.pad(x, (0, 0, 0, -x.shape[1] % size)).unflatten(1, (-1, size))


def _of_pairs(x: Tensor, ids: Tensor) -> Tensor:
    even = x.shape[1] // 2 * 2
    return x[:, :even].reshape(x.shape[0], -1, 2 * D)


def _windows(x: Tensor, ids: Tensor) -> Tensor:
    """Every token looks at its predecessors by a view of a padded copy."""
    seen = F.pad(x, (0, 0, 2, 0)).unfold(1, 3, 1)
    return (seen * x[..., None]).softmax(-1).mul(seen).sum(-1)


def _scanned(x: Tensor, ids: Tensor) -> Tensor:
    """Sums of blocks, and inside them: the pattern of chunked recurrences."""
    blocks = _blocks(x, 4)
    before = F.pad(blocks.sum(2).cumsum(1), (0, 0, 1, 0))[:, :-1]
    return (blocks.cumsum(2) + before[:, :, None]).flatten(1, 2)[:, : x.shape[1]]


def _in_place(x: Tensor, ids: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y += x
    y[:, 1:].mul_(0.5).add_(x[:, :-1])
    return y.clamp_(-2, 2)


SAME: dict[str, Word] = {
    "roll_length": lambda x, ids: x.roll(1, 1),
    "roll": lambda x, ids: x.roll(1, -1),
    "flip_length": lambda x, ids: x.flip(1),
    "flip": lambda x, ids: x.flip(-1),
    "shift_by_pad": lambda x, ids: F.pad(x[:, :-1], (0, 0, 1, 0)),
    "shift_by_cat": lambda x, ids: torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1),
    "less_the_first": lambda x, ids: x - x[:, :1],
    "written": _written,
    "index_put": lambda x, ids: x.index_put(
        (torch.arange(x.shape[0])[:, None], torch.arange(x.shape[1])[None]), x.detach() * 2
    ),
    "index_add": lambda x, ids: x.index_add(-1, torch.tensor([0, 2]), x[..., :2]),
    "index_copy": lambda x, ids: x.index_copy(-1, torch.tensor([0, 2]), x[..., 4:6]),
    "index_fill": lambda x, ids: x.index_fill(-1, torch.tensor([0, 2]), 0.25),
    "scatter_add": lambda x, ids: torch.zeros_like(x).scatter_add(
        -1, (ids[..., None] + torch.arange(D)) % D, x
    ),
    "slice_scatter": lambda x, ids: x.slice_scatter(torch.zeros_like(x[..., :2]), -1, 0, 2),
    "select_scatter": lambda x, ids: x.select_scatter(x[..., 0] * 2, -1, 1),
    "hardswish": lambda x, ids: F.hardswish(x), "mish": lambda x, ids: F.mish(x),
    "hardsigmoid": lambda x, ids: F.hardsigmoid(x), "hardtanh": lambda x, ids: F.hardtanh(x),
    "softshrink": lambda x, ids: F.softshrink(x), "celu": lambda x, ids: F.celu(x),
    "selu": lambda x, ids: F.selu(x), "logsigmoid": lambda x, ids: F.logsigmoid(x),
    "prelu": lambda x, ids: F.prelu(
        x.transpose(1, 2), torch.full((D,), 0.2, dtype=x.dtype)
    ).transpose(1, 2),
    "group_norm": lambda x, ids: F.group_norm(x.flatten(0, 1), 2).view_as(x),
    "group_norm_length": lambda x, ids: F.group_norm(x.transpose(1, 2), 2).transpose(1, 2),
    "instance_norm": lambda x, ids: F.instance_norm(x.transpose(1, 2)).transpose(1, 2),
    "std": lambda x, ids: x / (1 + x.std(-1, keepdim=True)),
    "normalize": lambda x, ids: F.normalize(x + 3, dim=-1),
    "norm_of_all": lambda x, ids: x / (1 + x.norm()),
    "max_of_all": lambda x, ids: x / (3 + x.max()),
    "any": lambda x, ids: x * (x > 0).any(-1, keepdim=True),
    "any_of_all": lambda x, ids: x * (x > 100).any(),
    "count": lambda x, ids: x * (x > 0).count_nonzero(-1)[..., None],
    "argmax": lambda x, ids: x * x.argmax(-1, keepdim=True),
    "sort": lambda x, ids: x.sort(-1)[0],
    "argsort": lambda x, ids: x.gather(-1, x.argsort(-1)),
    "take_along": lambda x, ids: x * torch.take_along_dim(x, (ids % D)[..., None], -1),
    "bucketize": lambda x, ids: x * torch.bucketize(
        x.detach().contiguous(), torch.tensor([-0.5, 0.0, 0.5], dtype=x.dtype)
    ),
    "cumsum_length": lambda x, ids: x.cumsum(1), "cumprod": lambda x, ids: x.cumprod(-1),
    "cumprod_length": lambda x, ids: (1 + x / 10).cumprod(1),
    "cummax": lambda x, ids: x.cummax(-1)[0], "cummax_length": lambda x, ids: x.cummax(1)[0],
    "logcumsumexp": lambda x, ids: x.logcumsumexp(-1),
    "logcumsumexp_length": lambda x, ids: x.logcumsumexp(1),
    "softmax_length": lambda x, ids: x.softmax(1),
    "tril": lambda x, ids: x.unflatten(-1, (2, 4)).tril().flatten(-2),
    "tril_length": lambda x, ids: x.tril(),
    "scores_under_triu": _scored, "rotated_as_complex": _rotated,
    "fourier_length": lambda x, ids: torch.fft.fft(x, dim=1).real,
    "fourier": lambda x, ids: torch.fft.fft(x, dim=-1).real,
    "linalg_solve": lambda x, ids: torch.linalg.solve(
        2 * torch.eye(D, dtype=x.dtype), x.transpose(1, 2)
    ).transpose(1, 2),
    "conv": lambda x, ids: F.conv1d(
        x.transpose(1, 2), torch.ones(D, D, 1, dtype=x.dtype) / D
    ).transpose(1, 2),
    "causal_conv": lambda x, ids: F.conv1d(
        F.pad(x.transpose(1, 2), (2, 0)), torch.ones(D, 1, 3, dtype=x.dtype) / 3, groups=D
    ).transpose(1, 2),
    "pooled_length": lambda x, ids: F.avg_pool1d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2),
    "lerp": lambda x, ids: torch.lerp(x, x * 2, 0.3),
    "addcmul": lambda x, ids: torch.addcmul(x, x, x, value=0.1),
    "where": lambda x, ids: torch.where(ids[..., None] > 5, x, 0.0),
    "one_hot": lambda x, ids: x + F.one_hot(ids, VOCAB)[..., :D],
    "counts": lambda x, ids: x * F.one_hot(ids, VOCAB).sum(1)[:, None, :D],
    "rms_norm": lambda x, ids: F.rms_norm(x, (D,)),
    "read_number": lambda x, ids: x / (1 + (ids > 4).sum().item()),
    "merged": lambda x, ids: x.reshape(-1, D).view(x.shape),
    "merged_twice": lambda x, ids: x.flatten().reshape(x.shape),
    "length_and_width": lambda x, ids: x.flatten(1).cos().unflatten(1, (-1, D)),
    "width_and_length": lambda x, ids: x.mT.flatten(1).view(-1, D, x.shape[1]).mT,
    "heads_as_batch": lambda x, ids: x.unflatten(-1, (2, 4)).transpose(1, 2).flatten(0, 1).tanh(
    ).unflatten(0, (-1, 2)).transpose(1, 2).flatten(2),
    "length_first": lambda x, ids: x.transpose(0, 1).flatten(1).unflatten(
        1, (-1, D)
    ).transpose(0, 1),
    "packed": lambda x, ids: x.reshape(1, -1, D).softmax(-1).view_as(x),
    "blocks": lambda x, ids: _blocks(x, 4).softmax(-1).flatten(1, 2)[:, : x.shape[1]],
    "within_blocks": lambda x, ids: (
        (y := _blocks(x, 4)) - y.mean(2, keepdim=True)
    ).flatten(1, 2)[:, : x.shape[1]],
    "windows": _windows, "scanned": _scanned, "in_place": _in_place,
    "listed": lambda x, ids: torch.cat(
        [x[..., [-1, 0, 0, 2]], x.unflatten(-1, (2, 4))[..., [1], :].flatten(-2)], -1
    ),
    "repeated": lambda x, ids: x.flatten(0, 1).repeat(3, 1).view(3, -1, D).sin().sum(0).view_as(x),
    "stopped": lambda x, ids: x + (x.detach() - x.detach().mean()),
    "integers": lambda x, ids: (x + ids[..., None] // 2) * (ids % 3)[..., None],
    "booleans": lambda x, ids: x * (ids > 4)[..., None] + ((x > 0) & (ids > 2)[..., None]),
    "singles": lambda x, ids: x * torch.tensor([0.5, 2.0] * 4, dtype=torch.float32),
    "bytes": lambda x, ids: x * (ids.to(torch.uint8) & 3)[..., None],
    "halves_joined": lambda x, ids: torch.cat([x[..., 4:], x[..., :4]], -1),
    "rotary": lambda x, ids: x * (at := torch.arange(x.shape[1])[:, None] * 0.1).cos()
    + torch.cat([-x[..., 4:], x[..., :4]], -1) * at.sin(),
    "distance_bias": lambda x, ids: (
        -(torch.arange(x.shape[1]) - torch.arange(x.shape[1])[:, None]).abs().to(x.dtype)
    ).softmax(-1) @ x,
    "einsum": lambda x, ids: torch.einsum("btd,bsd->bts", x, x).softmax(-1) @ x,
    "linear_attention": lambda x, ids: F.softplus(x) @ (F.softplus(x).mT @ x) / x.shape[1],
    "running_mean": lambda x, ids: x.cumsum(1) / (torch.arange(x.shape[1])[:, None] + 1),
    "up_and_down": lambda x, ids: F.interpolate(
        x.mT, scale_factor=2
    ).unflatten(-1, (-1, 2)).mean(-1).mT,
    "stacked": lambda x, ids: torch.stack([x, x.sin()], 2).flatten(1, 2)[:, ::2],
    "scattered": lambda x, ids: torch.zeros_like(x).scatter(1, torch.arange(
        x.shape[1]
    ).flip(0)[None, :, None].expand(x.shape), x),
    "clamped_by": lambda x, ids: torch.maximum(x, -x.detach().abs().amax(-1, keepdim=True) / 2),
    "straight_through": lambda x, ids: x + (x.round() - x).detach(),
    "nan_to_num": lambda x, ids: (x / (ids % 5)[..., None]).detach().nan_to_num(1, 1, 1) * x,
    "experts": lambda x, ids: sum(
        x.roll(i, -1) * w for i, w in enumerate(x[..., :3].softmax(-1).unsqueeze(-1).unbind(2))
    ),
}  # fmt: skip
TOKENS: dict[str, Word] = {
    "glu": lambda x, ids: F.glu(x, -1), "prod": lambda x, ids: x.prod(-1),
    "median": lambda x, ids: x.median(-1)[0], "kthvalue": lambda x, ids: x.kthvalue(3, -1)[0],
    "nanmedian": lambda x, ids: x.nanmedian(-1)[0], "mode": lambda x, ids: x.mode(-1)[0],
    "std_mean": lambda x, ids: sum(torch.std_mean(x, -1)),  # type: ignore[arg-type,return-value]
    "unfold": lambda x, ids: F.pad(x, (2, 0)).unfold(-1, 3, 1).sum(-1),
    "cdist": lambda x, ids: torch.cdist(x, torch.ones(5, D, dtype=x.dtype)),
    "spectrum": lambda x, ids: torch.fft.rfft(x, dim=-1).abs(),
    "max_pool": lambda x, ids: F.max_pool1d(x, 2), "avg_pool": lambda x, ids: F.avg_pool1d(x, 2),
    "adaptive_pool": lambda x, ids: F.adaptive_avg_pool1d(x, 4),
    "diagonal": lambda x, ids: x.unflatten(-1, (2, 4)).diagonal(dim1=-2, dim2=-1),
    "trace": lambda x, ids: torch.einsum("btii->bt", x[..., :4].unflatten(-1, (2, 2))),
    "outer": lambda x, ids: torch.einsum("btd,bte->btde", x, x),
    "det": lambda x, ids: torch.linalg.det(
        x[..., :4].unflatten(-1, (2, 2)) + 2 * torch.eye(2, dtype=x.dtype)
    ),
    "repeat_interleave": lambda x, ids: x.repeat_interleave(2, -1),
    "tensordot": lambda x, ids: torch.tensordot(x, torch.ones(D, 3, dtype=x.dtype), 1),
    "distances": lambda x, ids: (x[:, :, None] - x[:, None]).square().sum(-1).sum(-1),
    "logaddexp": lambda x, ids: torch.logaddexp(x, 2 * x),
    "topk": lambda x, ids: x.topk(3, -1).values * x.topk(2, -1).indices.sum(-1, keepdim=True),
    "one_of_four": lambda x, ids: x.unflatten(-1, (4, 2))[..., 1].amax(-1),
    "bilinear": lambda x, ids: F.bilinear(x, x, torch.ones(2, D, D, dtype=x.dtype) / D),
}  # fmt: skip
ANY: dict[str, Word] = {
    "last": lambda x, ids: x[:, -1], "diff": lambda x, ids: x.diff(dim=1),
    "twice": lambda x, ids: torch.cat([x, x], 1), "padded": lambda x, ids: F.pad(x, (0, 0, 3, 2)),
    "every_other": lambda x, ids: x[:, ::2], "gram": lambda x, ids: x.transpose(1, 2) @ x,
    "interleaved": lambda x, ids: x.repeat_interleave(2, 1),
    "by_token": lambda x, ids: torch.zeros(VOCAB, D, dtype=x.dtype).index_add(
        0, ids.flatten(), x.flatten(0, 1)
    ),
    "pairs": _of_pairs, "split": lambda x, ids: x.split(x.shape[1] - 1, 1)[0],
    "first_half": lambda x, ids: x.chunk(2, 1)[0],
    "block_means": lambda x, ids: _blocks(x, 3).mean(2),
    "rows_by_two": lambda x, ids: torch.stack([x, x.sin()], 2).flatten(1, 2).cumsum(1),
    "dot": lambda x, ids: x.flatten() @ x.flip(1).flatten(),
    "strided": lambda x, ids: F.conv1d(x.mT, torch.ones(3, D, 2, dtype=x.dtype), stride=2),
    "resized": lambda x, ids: F.interpolate(x.transpose(1, 2), scale_factor=2),
    "smooth_l1": lambda x, ids: F.smooth_l1_loss(x, torch.zeros_like(x)),
    "huber": lambda x, ids: F.huber_loss(x, torch.zeros_like(x), delta=0.3),
    "mse": lambda x, ids: F.mse_loss(x, torch.zeros_like(x)),
    "mse_sum": lambda x, ids: F.mse_loss(x, torch.zeros_like(x), reduction="sum"),
    "bce": lambda x, ids: F.binary_cross_entropy(x.sigmoid(), torch.full_like(x, 0.3)),
    "bce_of_logits": lambda x, ids: F.binary_cross_entropy_with_logits(x, torch.full_like(x, 0.3)),
    "soft_margin": lambda x, ids: F.soft_margin_loss(x, torch.ones_like(x)),
    "poisson": lambda x, ids: F.poisson_nll_loss(x, torch.ones_like(x)),
    "kl": lambda x, ids: F.kl_div(
        x.log_softmax(-1), torch.full_like(x, 1 / D), reduction="batchmean"
    ),
    "margin": lambda x, ids: F.margin_ranking_loss(
        x[..., :4], x[..., 4:], torch.ones_like(x[..., :4])
    ),
}  # fmt: skip
WORDS: dict[str, Word] = {**SAME, **TOKENS, **ANY}


def spoken(name: str, x: Tensor, ids: Tensor) -> Tensor:
    """``x`` moved by a word; bounded, and of its own shape."""
    y = WORDS[name](x, ids)
    if name in SAME:
        return x + torch.tanh(y)
    if name in TOKENS:
        return x + torch.tanh(y.reshape(*x.shape[:2], -1).mean(-1, keepdim=True))
    return x * (1 + torch.tanh(y.mean()))
