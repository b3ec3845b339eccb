"""One sequence over several ranks: ``python -m benchmarks.sequence`` in the repository root.

Ranks are processes on this machine that talk over gloo, one thread each. The peak is that of the
worst rank: live tensor bytes above what is alive before a step, with gradients. Collectives are
those of one step; the difference is the largest of a gradient from one rank's.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

import fxmem
from fxmem.measure.live import MIB, peak_bytes

KINDS = {
    "all_gather_single": "gathers", "reduce_scatter_single": "reductions to rows",
    "all_reduce": "sums of gradients",
}  # fmt: skip
LETS_GO = 0.05
"""Seconds."""


def build(layers: int) -> LlamaForCausalLM:
    """A tiny Llama, small beside its sequence; the same weights at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=512, max_position_embeddings=1 << 20, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def rank_main(rank: int, ranks: int, options: dict[str, Any], folder: str) -> None:
    """Measure one rank."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{ranks}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("sp",))
    stream = fxmem.Stream(chunk=options["chunk"], loss_chunk=options["chunk"], sequence="sp")
    model = fxmem.transform(build(options["layers"]), fxmem.Plan(stream=stream), mesh=mesh)
    ids = torch.randint(512, (1, options["length"]), generator=torch.Generator().manual_seed(1))

    def step(ids: torch.Tensor = ids) -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    step(ids[:, :256])  # compiles
    model.zero_grad()
    calls: Counter[str] = Counter()
    for name in KINDS:
        setattr(dist, name, _counted(getattr(dist, name), name, calls))
    peak = peak_bytes(step)
    gradients = {n: p.grad for n, p in model.named_parameters()}
    torch.save(((peak, dict(calls)), gradients), f"{folder}/{ranks}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _counted(fn: Callable[..., Any], name: str, calls: Counter[str]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        done = fn(*args, **kwargs)
        # gloo's thread lets go of the tensors a moment later; the profile sees no free in it
        time.sleep(LETS_GO)
        return done

    return call


def measure(ranks: int, options: dict[str, Any], folder: str) -> dict[str, Any]:
    """Some ranks: the worst of them, and how far its gradients are from one rank's."""
    mp.spawn(rank_main, (ranks, options, folder), nprocs=ranks)
    found = [torch.load(f"{folder}/{ranks}-{rank}.pt") for rank in range(ranks)]
    alone = torch.load(f"{folder}/1-0.pt")[1]
    difference = max(
        float((own[n] - want).abs().max() / want.abs().max())
        for _, own in found for n, want in alone.items()
    )  # fmt: skip
    peak = max(result[0] for result, _ in found)
    return {"ranks": ranks, "peak": peak, "calls": found[0][0][1], "difference": difference}


def table(records: list[dict[str, Any]]) -> str:
    """Rows for a document."""
    head = ["ranks", "peak MiB", "of one rank's", *KINDS.values(), "difference"]
    rows = [head, ["---"] * len(head)]
    for r in records:
        rows.append([
            str(r["ranks"]), f"{r['peak'] / MIB:.1f}", f"{r['peak'] / records[0]['peak']:.2f}",
            *(str(r["calls"].get(kind, 0)) for kind in KINDS), f"{r['difference']:.0e}",
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Parse, run, report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sequence", description=__doc__)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    options = {"length": given.length, "layers": given.layers, "chunk": given.chunk}
    records = []
    with tempfile.TemporaryDirectory(prefix="fxmem-benchmark-") as folder:
        for ranks in dict.fromkeys((1, *given.ranks)):
            records.append(measure(ranks, options, folder))
            print(table(records), flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "sequence.md").write_text(table(records) + "\n")


if __name__ == "__main__":
    main()
