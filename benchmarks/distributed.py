"""Training under FSDP2, side by side: ``python -m benchmarks.distributed`` in the repository root.

Each setup runs in processes of its own, one per rank, that talk over gloo on this machine. Figures
are those of the worst rank: peak of live tensor bytes above what is alive before a step, seconds of
a step (median), and collectives with the bytes of what they gather or
reduce, whole. The last column is the
largest difference of a gradient from plain FSDP2's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import fxmem
from fxmem.measure.live import MIB, peak_bytes

SETUPS = {"plain": "FSDP2", "checkpoint": "FSDP2, checkpointing", "fxmem": "FSDP2, fxmem"}
KINDS = {
    "all_gather_single": "gathers", "reduce_scatter_single": "reductions",
    "all_reduce": "all-reduces",
}  # fmt: skip


def build(layers: int) -> LlamaForCausalLM:
    """A small Llama with the proportions of a large one; the same weights at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=8192, max_position_embeddings=65536, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


@contextmanager
def counted() -> Iterator[tuple[Counter[str], Counter[str]]]:
    """Collectives inside, and bytes of what they gather or reduce, by kind."""
    calls: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    was = {name: getattr(dist, name) for name in KINDS}

    def count(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            given = [*args, *kwargs.values()]
            tensors = [t for t in given if isinstance(t, torch.Tensor)]
            calls[name] += 1
            moved[name] += max(t.numel() * t.element_size() for t in tensors)
            return was[name](*args, **kwargs)

        return call

    for name in KINDS:
        setattr(dist, name, count(name))
    try:
        yield calls, moved
    finally:
        for name, fn in was.items():
            setattr(dist, name, fn)


def rank_main(rank: int, setup: str, options: dict[str, Any], folder: str) -> None:
    """Measure one setup in one rank."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{setup}-{options['length']}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=options["ranks"])
    model = build(options["layers"])
    if setup == "checkpoint":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    if setup == "fxmem":
        fxmem.transform(model)
    generator = torch.Generator().manual_seed(rank)
    text = torch.randint(8192, (1, options["length"] + 6), generator=generator)
    ids = text[:, 3:-3]

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    step()  # compiles
    gradients = {n: p.grad.to_local().clone() for n, p in model.named_parameters()}
    model.zero_grad()
    peak = peak_bytes(step)
    seconds = []
    with counted() as (calls, moved):
        for _ in range(options["steps"]):
            model.zero_grad()
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
    count = options["steps"]
    result = {
        "peak": peak, "seconds": statistics.median(seconds),
        "calls": {k: v // count for k, v in calls.items()},
        "bytes": {k: v // count for k, v in moved.items()},
    }  # fmt: skip
    torch.save((result, gradients), f"{folder}/{setup}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def measure(setup: str, options: dict[str, Any], folder: str) -> dict[str, Any]:
    """One setup: the worst rank, and how far its gradients are from plain FSDP2's."""
    mp.spawn(rank_main, (setup, options, folder), nprocs=options["ranks"])
    ranks = range(options["ranks"])
    found = [torch.load(f"{folder}/{setup}-{rank}.pt") for rank in ranks]
    plain = [torch.load(f"{folder}/plain-{rank}.pt")[1] for rank in ranks]
    difference = max(
        float((own[n] - want[n]).abs().max()) for (_, own), want in zip(found, plain, strict=True)
        for n in want if want[n].numel()
    )  # fmt: skip
    results = [result for result, _ in found]
    return {
        "setup": setup, "length": options["length"], "difference": difference,
        "peak": max(r["peak"] for r in results), "seconds": max(r["seconds"] for r in results),
        "calls": results[0]["calls"], "bytes": results[0]["bytes"],
    }  # fmt: skip


def table(records: list[dict[str, Any]]) -> str:
    """Rows for a document."""
    head = ["tokens", "setup", "peak MiB", "s", *KINDS.values(), "MiB moved", "difference"]
    rows = [head, ["---"] * len(head)]
    for r in records:
        rows.append([
            str(r["length"]), SETUPS[r["setup"]], f"{r['peak'] / MIB:.0f}", f"{r['seconds']:.2f}",
            *(str(r["calls"].get(kind, 0)) for kind in KINDS),
            f"{sum(r['bytes'].values()) / MIB:.0f}", f"{r['difference']:.0e}",
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Parse, run, report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--setups", nargs="+", choices=tuple(SETUPS), default=tuple(SETUPS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    records = []
    with tempfile.TemporaryDirectory(prefix="fxmem-benchmark-") as folder:
        for length in given.lengths:
            options = {
                "length": length, "layers": given.layers, "ranks": given.ranks,
                "steps": given.steps,
            }  # fmt: skip
            for setup in dict.fromkeys(("plain", *given.setups)):
                records.append(measure(setup, options, folder))
                print(table(records[-1:]).splitlines()[-1], flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    data = {"torch": torch.__version__, "ranks": given.ranks, "records": records}
    (given.out / "distributed.json").write_text(json.dumps(data, indent=1))
    (given.out / "distributed.md").write_text(table(records) + "\n")
    print(table(records))


if __name__ == "__main__":
    main()
