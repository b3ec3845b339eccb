"""``lower="triton"``: matches by data flow, reasons, switches, fuel; equal to eager."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import fxmem
from fxmem import Plan, Stream, lowering
from fxmem.errors import PlanError

EXPECTED = {
    "norm", "norm_backward", "gated", "gated_backward", "rotary", "weight_grad", "linear_nll",
    "chunk_attention", "chunk_attention_backward",
}  # fmt: skip


def test_without_a_gpu_every_match_has_its_reason_and_nothing_changes() -> None:
    net, plain = tiny.model("llama"), tiny.model("llama")
    fxmem.transform(net, Plan(stream=Stream(chunk=8, loss_chunk=8), lower="triton"))
    fxmem.transform(plain, Plan(stream=Stream(chunk=8, loss_chunk=8), lower="eager"))
    loss, grads = tiny.step(net, tiny.batch())
    want, reference = tiny.step(plain, tiny.batch())
    assert loss == want and all((grads[n] == reference[n]).all() for n in reference)
    report = fxmem.explain(net)
    own = [k for k in report.kernels if k.lower == "triton"]
    assert {k.kernel for k in own} == EXPECTED
    assert all("no backend for device type cpu" in k.reason for k in own)
    assert "norm_backward" in str(report)


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [(lowering.OFF, "nrom", "nrom"), (lowering.FUEL, "few", "whole number")],
)
def test_wrong_switches_are_refused(
    name: str, value: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(PlanError, match=part):
        lowering.Lowering.of(Plan(lower="triton"))


SCRIPT = """
import tiny, fxmem
from fxmem import lowering
got = {}
for lower in ("eager", "triton"):
    net = tiny.model("llama", num_hidden_layers=1)
    fxmem.transform(net, fxmem.Plan(stream=fxmem.Stream(chunk=8, loss_chunk=8), lower=lower))
    got[lower] = tiny.step(net, tiny.batch(1, 11))
(want, reference), (loss, grads) = got["eager"], got["triton"]
assert abs(loss - want) < 1e-5 * abs(want), (loss, want)
floor = 1e-5 * max(float(g.abs().max()) for g in reference.values())
for name, g in reference.items():
    error = float((grads[name] - g).abs().max()) / max(float(g.abs().max()), floor)
    assert error < 2e-5 or float(g.abs().max()) <= floor, (name, error)
found = lowering.matches()
print(",".join(sorted({k for (_, k, why), n in found.items() if not why})))
print(sum(n for (_, _, why), n in found.items() if not why))
"""


def interpreted(**switches: str) -> tuple[set[str], int]:
    pytest.importorskip("triton", reason="no Triton for this system")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**env, **switches}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    names, count = done.stdout.splitlines()
    return set(filter(None, names.split(","))), int(count)


def test_lowered_programs_equal_eager_in_the_interpreter() -> None:
    assert interpreted()[0] == EXPECTED


def test_fuel_and_switches() -> None:
    names, count = interpreted(FXMEM_KERNEL_FUEL="2", FXMEM_KERNELS_OFF="linear_nll")
    assert count == 2 and "linear_nll" not in names
