"""The block-epoch that ``explain`` shows: roles and bytes per visit, as text and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import fxmem
from fxmem import SGD, BlockAdamW, Blocks, LowRank, Plan, Stream

LAYERS = 4


def prepared(**options: Any) -> Any:
    net = tiny.model(num_hidden_layers=LAYERS)
    return fxmem.transform(
        net, Plan(stream=Stream(chunk=8, loss_chunk=8), blocks=Blocks(**options))
    )


def test_roles_over_an_epoch_before_the_first_step() -> None:
    net = prepared(order="ascending", steps=3, inactive=SGD(0.1))
    epoch = fxmem.explain(net).blocks
    assert epoch is not None
    assert [(v.first, v.last) for v in epoch.visits] == [(0, 2), (3, 5), (6, 8), (9, 11)]
    assert all(v.saved_bytes is None for v in epoch.visits)
    layers = [row for row in epoch.rows if "layers" in row]
    for k, visit in enumerate(epoch.visits):
        expected = ["idle"] * k + ["active"] + ["update"] * (LAYERS - k - 1)
        assert [visit.roles[row] for row in layers] == expected
        assert visit.roles["head"] == "update"
        assert visit.roles["embedding"] == "idle"
        own = sum(p.nbytes for n, p in net.named_parameters() if n.startswith(f"{layers[k]}."))
        assert visit.gradient_bytes == own
        assert visit.state_bytes == 2 * own
    assert epoch.all_bytes == 3 * sum(p.nbytes for p in net.parameters())


def test_frozen_blocks_hand_on_and_low_rank_state_stays() -> None:
    badam = fxmem.explain(prepared(order="descending", steps=1)).blocks
    assert badam is not None
    assert list(badam.visits[-1].roles.values()).count("passes") == LAYERS  # 3 layers and head
    net = prepared(order="descending", steps=1, inactive=LowRank(rank=2), reach="all")
    epoch = fxmem.explain(net).blocks
    assert epoch is not None
    first, last = epoch.visits[0], epoch.visits[-1]
    assert first.update_bytes == 0
    assert last.state_bytes > first.state_bytes  # terms of the layer that was active first


def test_after_a_step_the_saved_states_are_known_and_the_epoch_goes_on(tmp_path: Path) -> None:
    net = prepared(order="ascending", steps=1, inactive=SGD(0.1))
    opt = BlockAdamW(net)
    ids = torch.randint(0, 32, (1, 16))
    for _ in range(LAYERS + 1):
        net(input_ids=ids, labels=ids).loss.backward()
        state = sum(
            v.nbytes for e in opt.state.values() for v in e.values() if isinstance(v, torch.Tensor)
        )
        assert state == 0  # a visit has one step
        opt.step()
    report = fxmem.explain(net)
    epoch = report.blocks
    assert epoch is not None
    assert epoch.index == 1
    assert epoch.step == LAYERS + 1
    saved = [v.saved_bytes for v in epoch.visits]
    assert saved == sorted(saved, reverse=True)
    assert saved[0] and saved[-1]
    # a layer of two chunks hands all its gradients over together
    assert epoch.visits[0].update_bytes > max(p.nbytes for p in net.model.layers[1].parameters())
    assert "block-epoch 1" in str(report)
    epoch.draw(tmp_path / "epoch.png")
    assert (tmp_path / "epoch.png").stat().st_size > 10_000


def test_bytes_agree_with_the_optimizer() -> None:
    net = prepared(order="ascending", steps=2, inactive=SGD(0.1))
    opt = BlockAdamW(net)
    ids = torch.randint(0, 32, (1, 16))
    net(input_ids=ids, labels=ids).loss.backward()
    epoch = fxmem.explain(net).blocks
    assert epoch is not None
    grads = sum(p.grad.nbytes for p in net.parameters() if p.grad is not None)
    assert epoch.visits[0].gradient_bytes == grads
    opt.step()
    state = [v for e in opt.state.values() for v in e.values() if isinstance(v, torch.Tensor)]
    assert epoch.visits[0].state_bytes == sum(v.nbytes for v in state)


def test_without_blocks_there_is_none() -> None:
    net = fxmem.transform(tiny.model(), Plan(stream=Stream()))
    assert fxmem.explain(net).blocks is None
    with pytest.raises(fxmem.NotTransformedError):
        fxmem.explain(tiny.model())
