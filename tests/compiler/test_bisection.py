"""``bisect`` finds the one edit that is wrong, and runs with any fuel are right."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import fxmem
from fxmem import Plan, Stream
from fxmem.compiler import region_codes
from fxmem.errors import PlanError, VerificationError
from fxmem.frontend.joint import Joint
from fxmem.rewriting.fuel import NAME, fuel, fuelled
from fxmem.rewriting.pipeline import Edit, LocalPass


@dataclass(frozen=True, slots=True)
class SineForTanh(LocalPass[Joint]):
    """Not what a user asked for."""

    name: str = "sine_for_tanh"

    def edits(self, joint: Joint) -> Iterator[Edit]:
        for node in joint.graph.nodes:
            if node.target is torch.ops.aten.tanh.default:
                yield partial(setattr, node, "target", torch.ops.aten.sin.default)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).tanh().square()
        return (self.b(x + y * torch.rsqrt(y.mean(-1, keepdim=True) + 1)).sin() ** 1).mean()


def right(x: Tensor) -> bool:
    """Gradients of a streamed step are those of plain autograd."""
    torch.manual_seed(0)
    net = Net().double()
    want = torch.autograd.grad(net(x), list(net.parameters()))
    plan = Plan(stream=Stream(chunk=4, loss_chunk=4))
    torch.compile(net, backend=fxmem.backend(plan))(x).backward()
    return all(
        torch.allclose(p.grad, w, 1e-10) for p, w in zip(net.parameters(), want, strict=True)
    )


X = torch.randn(2, 9, 8, dtype=torch.float64)


def test_a_wrong_edit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = (*region_codes.JOINT_PASSES, SineForTanh())
    monkeypatch.setattr(region_codes, "JOINT_PASSES", passes)
    kept = list(region_codes._CODES)
    culprit = fxmem.bisect(right, (X,))
    assert culprit is not None and culprit.name == "sine_for_tanh"
    changed = [x for x in culprit.diff.splitlines()[2:] if x[0] in "+-"]
    assert len(changed) == 2 and "aten.sin" in changed[1]
    assert f"rewrite {culprit.number}" in str(culprit)
    assert list(region_codes._CODES) == kept


def test_nothing_is_wrong() -> None:
    assert fxmem.bisect(right, (X,)) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_exact_without_rewrites(name: str) -> None:
    ids = tiny.batch(2, 21)["input_ids"]

    def loss_of(model: Any) -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    plain = tiny.model(name).double()
    streamed = copy.deepcopy(plain)
    loss_of(plain).backward()
    engine = fxmem.backend(Plan(stream=Stream(chunk=8, loss_chunk=8)))
    with fuelled(0) as tank, region_codes._CODES.set_aside():
        torch.compile(loss_of, backend=engine)(streamed).backward()
    assert tank.asked > 50
    for a, b in zip(plain.parameters(), streamed.parameters(), strict=True):
        assert float((a.grad - b.grad).norm()) <= 1e-10 * float(a.grad.norm())


def test_wrong_without_rewrites_is_said() -> None:
    with pytest.raises(VerificationError, match="without any rewrite"):
        fxmem.bisect(lambda: False)
    with pytest.raises(ZeroDivisionError):
        fxmem.bisect(lambda: 1 // 0)


def test_fuel_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, "0")
    assert not fuel().take()
    monkeypatch.setenv(NAME, "few")
    with pytest.raises(PlanError, match="whole number"):
        fuel()
    monkeypatch.delenv(NAME)
    assert fuel().take()
