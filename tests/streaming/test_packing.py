"""Rows whose label is ignored never reach the LM head, and nothing changes but that."""

from __future__ import annotations

import pytest
import tiny
import torch
from double import everything_in_double, largest_difference
from torch.profiler import ProfilerActivity, profile

import fxmem
from fxmem import Plan, Stream


def head_rows(events: profile) -> int:
    """Rows of all products of states and the head's weight."""
    shapes = [e.input_shapes for e in events.events() if e.name == "aten::mm"]
    return sum(a[0] for a, b in (s[:2] for s in shapes) if b == [32, tiny.VOCAB])


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("size", [1, 3])
def test_only_valid_rows_are_scored(name: str, size: int) -> None:
    with everything_in_double():
        net = tiny.model(name).double()
        inputs = tiny.batch(size, 23)
        inputs["labels"][:, 5:14] = -100
        if size > 1:
            inputs["labels"][1] = -100
        valid = int((inputs["labels"][:, 1:] != -100).sum())
        loss, want = tiny.step(net, inputs)
        fxmem.transform(net, Plan(stream=Stream(chunk=7, loss_chunk=5)))
        # warm: without the profile, so that the capture is not recorded
        tiny.step(net, inputs)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as events:
            got_loss, got = tiny.step(net, inputs)
    assert head_rows(events) == valid
    assert largest_difference(got, want)[0] <= 1e-10
    assert abs(got_loss - loss) <= 1e-10 * abs(loss)


def test_a_loss_that_reads_ignored_rows_is_not_packed() -> None:
    torch.manual_seed(0)
    net = tiny.model("llama").double()
    inputs = tiny.batch(2, 23)
    inputs["labels"][:, 3:] = -100

    def loss(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        out = net(input_ids=ids, labels=labels)
        return out.loss + net.model(input_ids=ids).last_hidden_state.square().mean()

    plan = Plan(stream=Stream(chunk=7, loss_chunk=5))
    step = torch.compile(loss, backend=fxmem.backend(plan), fullgraph=True)
    results = []
    for fn in (loss, step):
        net.zero_grad()
        fn(inputs["input_ids"], inputs["labels"]).backward()
        results.append({n: p.grad.clone() for n, p in net.named_parameters()})
    assert largest_difference(results[1], results[0])[0] <= 1e-5
