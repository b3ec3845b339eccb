"""``lower="inductor"``: the same numbers, compiled once, with no more memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import tiny
from double import compiled_in_double, largest_difference
from torch import nn

import fxmem
from fxmem import Plan, Stream, api
from fxmem.backends import inductor
from fxmem.measure import live as measure


def transformed(lower: str, chunk: int = 8, **changes: int) -> nn.Module:
    net = tiny.model("llama", **changes)
    stream = Stream(chunk=chunk, loss_chunk=chunk)
    return fxmem.transform(net, Plan(stream=stream, lower=lower))  # type: ignore[arg-type]


def test_peak_memory_is_that_of_eager_bodies_and_depth_compiles_nothing() -> None:
    wide = {"hidden_size": 64, "intermediate_size": 192, "max_position_embeddings": 1024}
    batch, peak = tiny.batch(1, 512), {}
    for lower in ("eager", "inductor"):
        net = transformed(lower, 64, **wide)
        tiny.step(net, batch)
        tiny.step(net, batch)
        peak[lower] = measure.peak_bytes(lambda net=net: tiny.step(net, batch))  # type: ignore[misc]
    assert peak["inductor"] <= 1.05 * peak["eager"]
    before = inductor.STATS.segments
    tiny.step(transformed("inductor", 64, **wide, num_hidden_layers=5), tiny.batch(1, 200))
    assert inductor.STATS.segments == before


def test_results_of_attention_are_held_and_both_forms_compile_at_first() -> None:
    """How many layers hold depends on the length; what they run was compiled in the first step."""
    wide = {"hidden_size": 128, "intermediate_size": 512, "max_position_embeddings": 4096}
    net = transformed("inductor", 64, **wide, num_hidden_layers=4)
    tiny.step(net, tiny.batch(1, 128))
    net.zero_grad(set_to_none=True)
    before, counts = (inductor.STATS.bodies, inductor.STATS.segments), set()
    (graph,) = api._TRANSFORMED[net].graphs
    for length in (200, 900, 3000):
        kept = graph.holding.to_run({**graph.sizes, "T": length}, fresh=True)
        counts.add(sum(kept.levels))
        tiny.step(net, tiny.batch(1, length))
        net.zero_grad(set_to_none=True)
    assert len(counts) > 1
    assert (inductor.STATS.bodies, inductor.STATS.segments) == before


SCRIPT = """
import torch
from torch import nn
import fxmem
from fxmem.backends import inductor

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return (x + self.down(nn.functional.silu(self.up(self.norm(x))))).square().mean()

plan = fxmem.Plan(stream=fxmem.Stream(chunk=8, loss_chunk=8), lower="inductor")
fxmem.transform(Net(), plan)(torch.randn(2, 23, 8)).backward()
assert not inductor.STATS.failed
print(inductor.STATS.compiled, inductor.STATS.cached)
"""


def test_a_second_process_finds_everything_compiled(tmp_path: Path) -> None:
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    # Headers compiled beforehand pay off over many kernels only.
    env["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] = "0"
    counts = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        counts.append([int(n) for n in done.stdout.split()])
    (made, cached), (again, found) = counts
    assert made == again == found >= 2 and cached < made


def test_exact_for_every_length_and_compiled_once() -> None:
    with compiled_in_double():
        plain = tiny.model("llama").double()
        net = transformed("inductor").double()
        tiny.step(net, tiny.batch(2, 23))
        before = (inductor.STATS.bodies, inductor.STATS.segments)
        assert not inductor.STATS.failed and before[0] >= 4
        for size, length in ((2, 23), (3, 17), (2, 40), (4, 16), (2, 9), (2, 7)):
            loss, grads = tiny.step(net, tiny.batch(size, length))
            want, reference = tiny.step(plain, tiny.batch(size, length))
            assert abs(loss - want) <= 1e-10 * abs(want)
            worst, where = largest_difference(grads, reference)
            assert worst <= 1e-10, (where, size, length)
    assert (inductor.STATS.bodies, inductor.STATS.segments) == before
    assert "compiled" in str(fxmem.explain(net))
