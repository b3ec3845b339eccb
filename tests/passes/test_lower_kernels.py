"""``lower="triton"``: matches by data flow, reasons, switches, fuel; equal to eager."""

from __future__ import annotations

import os
import subprocess
import sys
from ast import literal_eval
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from sources import ROOT

import fxmem
from fxmem import Plan, Stream
from fxmem.backends import lowering
from fxmem.errors import PlanError

LLAMA = {
    "norm", "norm_backward", "gated", "gated_backward", "rotary", "weight_grad", "linear_nll",
    "chunk_attention", "chunk_attention_backward",
}  # fmt: skip
GPT2 = LLAMA - {"gated", "gated_backward", "rotary"}
# Gemma 2 caps the scores of attention, which transformers then writes out.
GEMMA2 = LLAMA - {"chunk_attention", "chunk_attention_backward"}
DEPTH = {"gpt2": "n_layer"}
CHUNKS = Stream(chunk=8, loss_chunk=8)


def small(name: str, lower: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """One layer (two, where layers differ)."""
    depth = {DEPTH.get(name, "num_hidden_layers"): 1 if name != "gemma2" else 2}
    net = tiny.model(name, **depth).to(dtype)
    return fxmem.transform(net, Plan(stream=CHUNKS, lower=lower))  # type: ignore[arg-type]


def found_by(run: Callable[[], object]) -> Counter[tuple[str, str]]:
    """``(kernel, reason)`` of the matches made meanwhile."""
    before = lowering.matches()
    run()
    new = lowering.matches() - before
    return Counter({(k, why): n for (mode, k, why), n in new.items() if mode == "triton"})


def test_without_a_gpu_every_match_has_its_reason_and_nothing_changes() -> None:
    net, plain = small("llama", "triton"), small("llama", "eager")
    found = found_by(lambda: tiny.step(net, tiny.batch()))
    loss, grads = tiny.step(net, tiny.batch())
    want, reference = tiny.step(plain, tiny.batch())
    assert loss == want and all((grads[n] == reference[n]).all() for n in reference)
    assert {k for k, _ in found} == LLAMA
    assert all("no backend for device type cpu" in why for _, why in found)
    report = fxmem.explain(net)
    assert {k.kernel for k in report.kernels if k.lower == "triton"} >= LLAMA
    assert "norm_backward" in str(report)


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("llama", torch.bfloat16, LLAMA),
        ("gpt2", torch.bfloat16, GPT2),
        ("gemma2", torch.bfloat16, GEMMA2),
        ("gemma2", torch.float32, GEMMA2),
    ],
)
def test_matches(name: str, dtype: torch.dtype, expected: set[str]) -> None:
    net = small(name, "triton", dtype)
    found = found_by(lambda: tiny.step(net, tiny.batch()))
    assert {k for k, why in found if "no backend" in why} == expected
    rest = {(k, why) for k, why in found if "no backend" not in why}
    alone = {
        ("chunk_attention", "attention written out: its scores stand whole"),
        ("norm", "a norm of another form"),
    }
    assert rest == (alone if name == "gemma2" else set())


def test_a_wrong_switch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(lowering.OFF, "nrom")
    with pytest.raises(PlanError, match="nrom"):
        lowering.Lowering.of(Plan(lower="triton"))


HEAD = """
import os, fxmem, tiny, torch
from fxmem.backends import lowering
from fxmem.blocks import rounding
from fxmem.compiler import region_codes
from fxmem.rewriting import pipeline
from fxmem.rewriting.fuel import fuelled
from fxmem.roles import kernel_update
from fxmem.runtime.code_library import CodeLibrary
from test_lower_kernels import small

def replaced(before):
    return {k: n for (_, k, why), n in (lowering.matches() - before).items() if not why}

"""

EQUAL = '''
for name in ("llama", "gpt2", "gemma2"):
    got = {lower: tiny.step(small(name, lower), tiny.batch(1, 11)) for lower in ("eager", "triton")}
    (want, reference), (loss, grads) = got["eager"], got["triton"]
    assert abs(loss - want) < 1e-5 * abs(want), (name, loss, want)
    floor = 1e-5 * max(float(g.abs().max()) for g in reference.values())
    for key, g in reference.items():
        error = float((grads[key] - g).abs().max()) / max(float(g.abs().max()), floor)
        assert error < 2e-5 or float(g.abs().max()) <= floor, (name, key, error)

net = small("llama", "triton")
tiny.step(net, tiny.batch(1, 11))
assert fxmem.explain(net).predicted_peak_bytes

def preference(lower):
    """Loss and gradients of one sequence against another, the loss in the compiled function."""
    net = tiny.model("llama", num_hidden_layers=1)
    ids = tiny.batch(2, 11)["input_ids"]
    def loss(ids):
        logits = net(input_ids=ids, use_cache=False).logits[:, :-1].float()
        chosen = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).sum((1, 2))
        return -torch.nn.functional.logsigmoid(chosen[0] - chosen[1])
    plan = fxmem.Plan(stream=fxmem.Stream(chunk=8, loss_chunk=8), lower=lower)
    out = torch.compile(loss, backend=fxmem.backend(plan))(ids)
    out.backward()
    return [out.detach(), *(p.grad for p in net.parameters())]

before = lowering.matches()
for a, b in zip(preference("eager"), preference("triton"), strict=True):
    assert float((a - b).abs().max()) < 2e-5 * float(a.abs().max())
assert {"linear_nll", "linear_nll_backward"} & set(replaced(before)), replaced(before)

def moved(lower, inactive):
    """Weights after the updates of one backward that runs in one chunk."""
    net = tiny.model("llama")
    plan = fxmem.Plan(stream=fxmem.Stream(chunk=64, loss_chunk=64), lower=lower,
                      blocks=fxmem.Blocks(steps=2, inactive=inactive))
    fxmem.transform(net, plan)
    fxmem.BlockAdamW(net, lr=0.01)
    net(**tiny.batch(1, 11)).loss.backward()
    return torch.cat([p.detach().flatten() for p in net.parameters()])

for inactive, flips in ((fxmem.SGD(0.1), 0.0), (fxmem.SignSGD(0.01), 0.01)):
    start = torch.cat([p.detach().flatten() for p in tiny.model("llama").parameters()])
    want, got = moved("eager", inactive), moved("triton", inactive)
    assert float((want != start).float().mean()) > 0.3
    assert float(((got - want).abs() > 1e-5).float().mean()) <= flips, inactive

# A bfloat16 weight, and a gradient that is exact in any order of its sum.
w, a, b = torch.randn(9, 17).bfloat16(), torch.randint(-4, 5, (9, 5)) / 64.0, torch.ones(5, 17)
key = rounding.key(0, "w", 3)
want = rounding.stochastic_round(w.float() - 2.0**-9 * (a @ b), key)
assert kernel_update.move(w, a, b, kernel_update.Rule(2.0**-9, False, key))
assert torch.equal(w, want)
print(replaced(type(lowering.matches())()))
'''

FUEL = '''
os.environ.update(FXMEM_KERNELS_OFF="linear_nll")

def step_with(limit):
    """Kernels that replaced something, and in the first body; rewrites until then."""
    region_codes._CODES, first = CodeLibrary(), []
    torch.compiler.reset()
    def observe(applied):
        if applied.name == "lower_kernels" and not first:
            first.extend((sum(replaced(before).values()), tank.asked))
    pipeline.OBSERVERS[:], before = [observe], lowering.matches()
    with fuelled(limit) as tank:
        tiny.step(small("llama", "triton"), tiny.batch(1, 11))
    return replaced(before), *first

off, count, asked = step_with(None)
print([off, count, *step_with(asked - 1)[:1]])
'''


def interpreted(script: str) -> Any:
    """What a script prints last, in a process with Triton's interpreter."""
    pytest.importorskip("triton", reason="no Triton for this system")
    env = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(str(ROOT / "tests" / n) for n in ("helpers", "passes")),
    }
    code = HEAD + script
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return literal_eval(done.stdout.splitlines()[-1])


def test_lowered_programs_equal_eager_in_the_interpreter() -> None:
    assert set(interpreted(EQUAL)) == LLAMA | {"weight_update"}


def test_fuel_and_switches() -> None:
    """Kernels that replaced something, with a switch, and with fuel for all but the last."""
    off, count, fewer = interpreted(FUEL)
    assert off and "linear_nll" not in off
    assert sum(fewer.values()) == count - 1
