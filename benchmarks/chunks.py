"""Time against rows per chunk, for many widths: ``python -m benchmarks.chunks``.

A decoder layer for each hidden size, and a head with its loss for each vocabulary, forward and
backward, streamed in chunks of so many rows. Lengths take turns, so that other load on the machine
meets all of them. The last line is what fxmem's own calibration of this device says.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import fxmem
from fxmem.measure.knee import WITHIN, knee, of_curve

ROWS = (64, 128, 256, 384, 512, 768, 1024)


class Layer(nn.Module):
    """One layer of a Llama; its loss is of the sum of squares."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        config = LlamaConfig(
            hidden_size=hidden, intermediate_size=11 * hidden // 4, num_hidden_layers=1,
            num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64,
            attn_implementation="sdpa",
        )  # fmt: skip
        self.rotary = LlamaRotaryEmbedding(config)
        self.layer = LlamaDecoderLayer(config, 0)

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1], device=x.device)[None]
        out = self.layer(x, position_ids=at, position_embeddings=self.rotary(x, at))
        return out.square().mean()


class Head(nn.Module):
    """A projection to a vocabulary with the loss of the next token."""

    def __init__(self, hidden: int, vocabulary: int) -> None:
        super().__init__()
        self.head = nn.Linear(hidden, vocabulary, bias=False)
        self.vocabulary = vocabulary

    def forward(self, x: Tensor) -> Tensor:
        labels = torch.arange(x.shape[1], device=x.device) % self.vocabulary
        return cross_entropy(self.head(x)[0], labels)


def curve(make: Callable[[], nn.Module], hidden: int, field: str, options: Any) -> dict[int, float]:
    """Seconds per row by rows per chunk: the least of the repeats."""
    model = make().to(options.device)
    x = torch.randn(1, options.tokens, hidden, device=options.device, requires_grad=True)
    found = dict.fromkeys(options.rows, float("inf"))
    for repeat in range(options.repeats):
        for rows in options.rows:
            stream = fxmem.Stream(chunk=rows, loss_chunk=rows, hold="none")
            fxmem.transform(model, fxmem.Plan(stream=stream))
            model(x).backward()  # captures
            start = time.perf_counter()
            loss = model(x)
            loss.backward()
            float(x.grad.sum())  # waits for a GPU
            found[rows] = min(found[rows], (time.perf_counter() - start) / options.tokens)
            fxmem.restore(model)
        print(f"{field}: round {repeat + 1} of {options.repeats}", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; the table is written as well."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chunks", description=__doc__)
    add = parser.add_argument
    add("--hidden", type=int, nargs="*", default=[256, 1024, 4096])
    add("--vocabulary", type=int, nargs="*", default=[16384, 65536, 262144])
    add("--rows", type=int, nargs="+", default=ROWS)
    add("--tokens", type=int, default=1024)
    add("--repeats", type=int, default=3)
    add("--device", type=torch.device, default=torch.device("cpu"))
    add("--out", type=Path, default=Path("benchmarks/results/chunks.md"))
    options = parser.parse_args(arguments)
    curves = {
        f"layer, hidden size {h}": curve(lambda h=h: Layer(h), h, f"layer {h}", options)
        for h in options.hidden
    }
    for v in options.vocabulary:
        curves[f"loss, vocabulary {v}"] = curve(lambda v=v: Head(512, v), 512, f"loss {v}", options)
    text = table(curves, options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text)
    print(text)
    return 0


def table(curves: dict[str, dict[int, float]], options: Any) -> str:
    """Time relative to the best of a line, and the fewest rows that are nearly as fast."""
    lines = [
        f"# Time against rows per chunk, {options.device}, {options.tokens} tokens", "",
        "| | " + " | ".join(str(r) for r in options.rows) + " | knee |",
        "|---" + "|--:" * (len(options.rows) + 1) + "|",
    ]  # fmt: skip
    for name, found in curves.items():
        best = min(found.values())
        cells = [f"{found[r] / best:.2f}" for r in options.rows]
        lines.append(f"| {name} | {' | '.join(cells)} | {of_curve(found)} |")
    own = knee(options.device, torch.float32)
    lines += ["", f"Knee: fewest rows within {WITHIN:.2f} of the best. By calibration: {own}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
