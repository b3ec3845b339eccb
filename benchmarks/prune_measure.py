"""What is measured on one model: perplexity, minimal pairs, speed, memory, bytes."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxmem.measure.live import peak_bytes


def texts(tokenizer: Any, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Calibration and held-out sequences [N, length] from disjoint topics of Python's reference."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    parts = []
    for chosen in ([n for i, n in enumerate(names) if i % 8], names[::8]):
        ids = tokenizer("\n\n".join(topics[name] for name in chosen))["input_ids"]
        rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        parts.append(rows[order])
    return parts[0], parts[1]


def rows_of(tokenizer: Any, file: Path, length: int, count: int) -> Tensor:
    """The first `count` sequences [count, length] of a text, or of the strings in JSON lines."""
    text = file.read_text()
    if file.suffix == ".jsonl":
        text = "\n\n".join(
            "\n".join(json.loads(line).values()) for line in text.splitlines()[:2000]
        )
    ids = tokenizer(text)["input_ids"][: length * count]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


@torch.no_grad()
def mean_loss(model: nn.Module, rows: Tensor, batch: int = 4) -> float:
    """Mean loss per predicted token."""
    losses = [
        float(model(input_ids=ids, labels=ids, use_cache=False).loss) * len(ids)
        for ids in rows.split(batch)
    ]
    return sum(losses) / len(rows)


def perplexity(model: nn.Module, rows: Tensor) -> float:
    """exp of the mean loss per predicted token."""
    return math.exp(min(700.0, mean_loss(model, rows)))


def pairs(path: Path, count: int) -> list[dict[str, str]]:
    """`count` minimal pairs, evenly from all phenomena of the file (JSON lines: good, bad, uid)."""
    groups = defaultdict(list)
    for line in path.read_text().splitlines():
        pair = json.loads(line)
        groups[pair["uid"]].append(pair)
    ordered = [
        g[i] for i in range(max(map(len, groups.values()))) for g in groups.values() if i < len(g)
    ]
    return ordered[:count]


@torch.no_grad()
def accuracy(model: nn.Module, tokenizer: Any, chosen: Sequence[dict[str, str]]) -> float:
    """Part of the pairs whose acceptable sentence is the more probable one (arXiv 1912.00582)."""
    right = 0
    for start in range(0, len(chosen), 8):
        some = chosen[start : start + 8]
        sentences = [pair[key] for pair in some for key in ("good", "bad")]
        rows = [tokenizer(s)["input_ids"] for s in sentences]
        # Every sentence is read after the same first token, so its first word counts too.
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else 0
        rows = [[first, *row] for row in rows]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        there = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        logits = model(input_ids=ids, attention_mask=there, use_cache=False).logits[:, :-1]
        scores = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        total = (scores * there[:, 1:]).sum(1)
        right += int((total[0::2] > total[1::2]).sum())
    return right / len(chosen)


@torch.no_grad()
def speed(model: nn.Module, length: int, batch: int) -> tuple[float, float]:
    """Seconds of one forward: of the decoder stack, and of the whole model with its head."""
    ids = torch.randint(1000, (batch, length), generator=torch.Generator().manual_seed(0))
    stack = model.get_submodule(model.base_model_prefix)
    inside = 0.0

    def enter(*_: Any) -> None:
        nonlocal inside
        inside -= time.perf_counter()

    def leave(*_: Any) -> None:
        nonlocal inside
        inside += time.perf_counter()

    handles = [stack.register_forward_pre_hook(enter), stack.register_forward_hook(leave)]
    start = time.perf_counter()
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return inside, time.perf_counter() - start


def memory(model: nn.Module, length: int, batch: int) -> int:
    """Peak live bytes above the parameters during one forward without gradients."""
    ids = torch.zeros(batch, length, dtype=torch.int64)

    def forward() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)

    return peak_bytes(forward)


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, shared ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
