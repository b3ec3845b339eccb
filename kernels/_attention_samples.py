"""Calls of the attention kernels at realistic size, for compilation and cost tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxmem.kernels.kernel import Cost, Sample

_C, _S = 2048, 32768  # a late chunk of a long sequence


def _ints(rows: int) -> Tensor:
    return torch.empty(1, rows, dtype=torch.int32, device="meta")


def _everything() -> dict[str, Any]:
    return {
        "q_segment": _ints(_C),
        "k_segment": _ints(_S),
        "k_valid": torch.empty(1, _S, dtype=torch.bool, device="meta"),
        "mask": torch.empty(1, 1, _C, _S, dtype=torch.bool, device="meta"),
        "sinks": torch.empty(32, device="meta"),
    }


def heads(
    e: int, dtype: torch.dtype, wrap: Callable[..., Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a causal call with heads of ``e`` elements."""

    def forward() -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        new: dict[str, Any] = {"device": "meta", "dtype": dtype}
        kv = torch.empty(1, 8, _S, e, **new)
        given = {"scale": e**-0.5, "offset": _S - _C}
        return (torch.empty(1, 32, _C, e, **new), kv, kv), given

    return forward() if wrap is None else wrap(forward)


def sample(wrap: Callable[..., Any] | None = None) -> tuple[Sample, ...]:
    """Samples with 32 query and 8 key heads; ``wrap`` makes those of the backward from them."""

    def one(e: int, label: str, dtype: torch.dtype = torch.bfloat16, **extra: Any) -> Sample:
        def arguments() -> tuple[tuple[Any, ...], dict[str, Any]]:
            args, given = heads(e, dtype, wrap)
            return args, {**given, **extra}

        # 2 products of 2 E operations per visible pair forward, 7 backward (3 to dQ, 4 to dK, dV).
        pairs = 32 * _C * min(_S - _C / 2, extra.get("window", _S))
        products, passes = (2, 1) if wrap is None else (7, 3)
        keys = min(_S, extra.get("window", _S) + _C)
        moved = 2 * e * passes * 2 * (32 * _C + 8 * keys)
        return Sample(label, arguments, Cost(2 * e * products * pairs, moved), dtype)

    return (
        one(128, "C 2048, S 32768, E 128"),
        one(64, "E 64, window 4096", window=4096),
        one(32, "E 32"),
        one(128, "E 128, segments", q_segment=_ints(_C), k_segment=_ints(_S)),
        one(256, "E 256, softcap", softcap=50.0),
        one(128, "E 128, all masks", window=4096, softcap=50.0, **_everything()),
        one(128, "E 128, float32", torch.float32),
        one(256, "E 256, float32", torch.float32),
    )
