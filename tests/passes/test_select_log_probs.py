"""Log-probabilities of chosen tokens, however they are spelled: the head's logits are neither
sliced, copied nor scattered into.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxmem
from fxmem import Plan, Stream
from fxmem.frontend import functional_writes as functional
from fxmem.passes.select_log_probs import SelectLogProbs
from fxmem.passes.slice_rows_first import SliceRowsFirst
from fxmem.rewriting.pipeline import run_passes

B, T, D, V = 2, 11, 6, 13
Loss = Callable[[Tensor, Tensor], Tensor]


class Net(nn.Module):
    def __init__(self, loss: Loss) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.body, self.head = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, V)
        self.loss = loss

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.loss(self.head(x + torch.tanh(self.body(x))), ids)


def methods(logits: Tensor, ids: Tensor) -> Tensor:
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1).sum()


def functions(logits: Tensor, ids: Tensor) -> Tensor:
    logp = F.log_softmax(logits[..., :-1, :] / 0.7, dim=2)
    picked = torch.gather(logp, 2, ids[:, 1:].unsqueeze(-1))
    return (picked[..., 0].sum(1) ** 2).mean()


def keywords(logits: Tensor, ids: Tensor) -> Tensor:
    logp = torch.log_softmax(input=logits.double()[:, :-1, :].contiguous(), dim=-1)
    return logp.gather(dim=-1, index=ids[:, 1:, None]).exp().sum()


def capped(logits: Tensor, ids: Tensor) -> Tensor:
    logits = (torch.tanh(logits / 3.0) * 3.0)[:, 2:-1]
    return logits.log_softmax(2, dtype=torch.float64).gather(2, ids[:, 3:, None]).mean()


def picked_twice(logits: Tensor, ids: Tensor) -> Tensor:
    logp = nn.LogSoftmax(-1)(logits[:, :-1])
    return (logp.gather(-1, ids[:, 1:, None]) - logp.gather(-1, ids[:, :-1, None])).sum()


REWRITTEN: tuple[Loss, ...] = (methods, functions, keywords, capped, picked_twice)


def entropy_too(logits: Tensor, ids: Tensor) -> Tensor:
    logp = logits.log_softmax(-1)
    return logp.gather(-1, ids[..., None]).sum() - (logp.exp() * logp).sum()


def two_per_row(logits: Tensor, ids: Tensor) -> Tensor:
    both = torch.stack([ids, ids.flip(-1)], -1)
    return logits.log_softmax(-1).gather(-1, both).sum()


def fewer_rows(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, ids[:, 3:, None]).sum()


def across_tokens(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.log_softmax(1).gather(1, ids[:, None, :1].expand(-1, 1, V) % T).sum()


def narrow_type(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.bfloat16().log_softmax(-1).gather(-1, ids[..., None]).sum()


LEFT_ALONE: tuple[Loss, ...] = (entropy_too, two_per_row, fewer_rows, across_tokens, narrow_type)


def captured(net: nn.Module, ids: Tensor) -> fx.GraphModule:
    found: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: Any) -> fx.GraphModule:
        found.append(gm)
        return gm

    torch._dynamo.reset()
    torch.compile(net, backend=keep, dynamic=True)(ids)
    return run_passes((SliceRowsFirst(), SelectLogProbs()), found[0])


def step(net: nn.Module, call: Callable[[Tensor], Tensor], ids: Tensor) -> list[Tensor]:
    net.zero_grad()
    loss = call(ids)
    loss.backward()
    return [loss.detach(), *(p.grad for p in net.parameters() if p.grad is not None)]


def assert_streams_exactly(loss: Loss) -> None:
    torch.set_default_dtype(torch.float64)
    net, ids = Net(loss), torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))
    want = step(net, net, ids)
    torch._dynamo.reset()
    plan = Plan(stream=Stream(chunk=3, loss_chunk=3))
    compiled = torch.compile(net, backend=fxmem.backend(plan), dynamic=True)
    for a, b in zip(want, step(net, compiled, ids), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.fixture(autouse=True)
def _default_type():
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("loss", REWRITTEN)
def test_whatever_way_it_is_spelled(loss: Loss) -> None:
    gm = captured(Net(loss), torch.randint(V, (B, T)))
    targets = [getattr(n.target, "__name__", n.target) for n in gm.graph.nodes]
    assert functional.selected_log_probs.__name__ in targets
    assert not {"log_softmax", "gather"} & set(targets)
    heads = [n for n in gm.graph.nodes if n.target is F.linear and V in value(n).shape]
    assert all(loss is picked_twice or value(n).shape[1] != T for n in heads)
    assert_streams_exactly(loss)


def value(node: fx.Node) -> Tensor:
    found: Tensor = node.meta["example_value"]
    return found


@pytest.mark.parametrize("loss", LEFT_ALONE)
def test_what_is_not_a_choice_of_one_entry_per_row_stays(loss: Loss) -> None:
    gm = captured(Net(loss), torch.randint(V, (B, T)))
    assert functional.selected_log_probs not in [n.target for n in gm.graph.nodes]
    if loss is not narrow_type:
        assert_streams_exactly(loss)


def test_a_place_outside_the_vocabulary_stays_an_error() -> None:
    def outside(logits: Tensor, ids: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(-1, ids[..., None] - 100).sum()

    torch._dynamo.reset()
    net = Net(outside)
    plan = Plan(stream=Stream(chunk=3, loss_chunk=3))
    compiled = torch.compile(net, backend=fxmem.backend(plan), dynamic=True)
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        compiled(torch.randint(V, (B, T)))


def test_logits_that_are_read_whole_are_not_computed_twice() -> None:
    def whole_too(logits: Tensor, ids: Tensor) -> Tensor:
        picked = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
        return picked.sum() + logits.square().mean()

    gm = captured(Net(whole_too), torch.randint(V, (B, T)))
    assert len([n for n in gm.graph.nodes if n.target is F.linear]) == 2
    assert_streams_exactly(whole_too)


def test_a_head_called_by_keywords() -> None:
    def keyword_head(logits: Tensor, ids: Tensor) -> Tensor:
        again = F.linear(input=logits, weight=torch.ones(V, V, dtype=logits.dtype))[:, :-1]
        return again.log_softmax(-1).gather(-1, ids[:, 1:, None]).sum()

    assert_streams_exactly(keyword_head)


def test_under_autocast_inside_the_function() -> None:
    def autocast(logits: Tensor, ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            again = F.linear(logits, torch.ones(V, V)) + logits
        return again[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None]).sum()

    net, ids = Net(autocast), torch.randint(V, (B, T))
    want = step(net, net, ids)
    torch._dynamo.reset()
    plan = Plan(stream=Stream(chunk=3, loss_chunk=3))
    got = step(net, torch.compile(net, backend=fxmem.backend(plan), dynamic=True), ids)
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
