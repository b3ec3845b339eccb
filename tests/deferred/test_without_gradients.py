"""Calls without gradients stream: references, evaluation, metrics. Decoding is left alone."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from double import everything_in_double, largest_difference
from outside_losses import LOSSES, batch, dpo, log_probs
from torch import Tensor, nn
from twins import VOCAB, D, ids

import fxmem
from fxmem import Plan, Stream
from fxmem.deferred.tensor import Deferred
from fxmem.runtime.counters import COUNTER

Twins = tuple[nn.Module, nn.Module]
DEFAULT = ("cross_entropy", "grpo")
PLAN = Plan(stream=Stream(chunk=7, loss_chunk=5))


@pytest.fixture(scope="module")
def twins() -> Iterator[Twins]:
    with everything_in_double():
        plain = tiny.model().double()
        yield plain, fxmem.transform(copy.deepcopy(plain), PLAN)


def programs(net: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = fxmem.api._TRANSFORMED[net].recorder.programs
    return found


def close(got: Tensor, want: Tensor) -> None:
    got = torch.from_numpy(got.numpy())
    assert (got - want).abs().max() <= 1e-10 * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize(
    "name", [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in LOSSES]
)
def test_loss(name: str, twins: Twins) -> None:
    plain, streamed = twins
    before = len(programs(streamed))
    with warnings.catch_warnings():
        warnings.simplefilter("error", fxmem.FxmemWarning)
        for length, mode in ((23, torch.no_grad), (31, torch.no_grad), (31, torch.inference_mode)):
            data = batch(length)
            with mode():
                want, got = (LOSSES[name](net(input_ids=data["ids"]).logits, data) for net in twins)
                close(got, want)
    assert len(programs(streamed)) == before + 1
    program = list(programs(streamed).values())[-1]
    assert program.backend.graphs and program.backend.graphs[0].whole_calls == 0


@torch.no_grad()
def test_loss_logits_and_cache_of_one_call(twins: Twins) -> None:
    data = batch(23)
    want, got = (net(input_ids=data["ids"], labels=data["labels"]) for net in twins)
    assert isinstance(got.logits, Deferred) and type(got.loss) is Tensor
    close(got.loss, want.loss)
    assert torch.equal(got.logits.argmax(-1), want.logits.argmax(-1))
    assert torch.equal(got.logits.topk(3).indices, want.logits.topk(3).indices)
    for layer, other in zip(
        got.past_key_values.layers, want.past_key_values.layers, strict=True
    ):  # fmt: skip
        close(layer.keys, other.keys)
    close(got.logits.cpu(), want.logits)  # whole, where that is what is wanted


@torch.no_grad()
def test_decoding_runs_as_it_is(twins: Twins) -> None:
    before = COUNTER.captures
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want, got = (net.generate(ids()[:, :9], **given) for net in twins)
    assert torch.equal(got, want) and COUNTER.captures == before


def test_metrics_are_read_after_weights_have_changed(twins: Twins) -> None:
    plain, streamed = (copy.deepcopy(net) for net in twins)
    found = []
    for net in (plain, streamed):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        with torch.no_grad():  # of several batches, as PPO does
            old = [log_probs(net(input_ids=d["ids"]).logits, d) for d in (batch(23), batch(31))]
        data = batch(23)
        logits = net(input_ids=data["ids"]).logits
        loss = -(log_probs(logits, data) - old[0]).exp().mean()
        right = (logits.argmax(-1) == data["ids"]).double().mean()
        loss.backward()
        predicted = logits[:, -3:].argmax(-1)  # recorded after the backward
        optimizer.step()
        found.append([*old, right, predicted.double(), *net.parameters()])
    for got, want in zip(found[1], found[0], strict=True):
        close(got.detach(), want.detach())


@torch.no_grad()
def test_metrics_of_earlier_batches_hold_no_states(twins: Twins) -> None:
    kept = [twins[1](input_ids=batch(n)["ids"]).logits.argmax(-1) for n in (23, 31, 24)]
    assert [x._node.real is not None for x in kept] == [True, True, False]


def test_reference_and_teacher(twins: Twins) -> None:
    """A frozen reference in DPO, and a teacher whose logits are part of a loss."""
    plain, streamed = (copy.deepcopy(net) for net in twins)
    with torch.no_grad():
        for p in plain.lm_head.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    references = [plain.requires_grad_(False), fxmem.transform(copy.deepcopy(plain), PLAN)]
    students = [copy.deepcopy(twins[0]), streamed]
    found = []
    data = batch(23)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fxmem.FxmemWarning)
        for net, reference in zip(students, references, strict=True):
            with torch.no_grad():
                teacher = reference(input_ids=data["ids"]).logits
                own = log_probs(teacher, data).sum(-1)
            logits = net(input_ids=data["ids"]).logits
            loss = dpo(logits, {**data, "reference": own}) + nn.functional.kl_div(
                logits.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True
            )
            net.zero_grad()
            loss.backward()
            grads = {n: p.grad for n, p in net.named_parameters()}
            found.append({**grads, "loss": loss.detach()})
    assert largest_difference(found[1], found[0])[0] <= 1e-10


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, D), nn.Linear(D, VOCAB)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return self.head(h if h.sum() > 0 else -h)  # type: ignore[no-any-return]


def test_what_no_graph_takes_is_evaluated_in_parts() -> None:
    plain = Branching().double()
    net = fxmem.transform(copy.deepcopy(plain), PLAN)
    with torch.no_grad():
        with pytest.warns(fxmem.FxmemWarning, match="Branching is captured in parts"):
            close(net(ids()), plain(ids()))
        with warnings.catch_warnings():
            warnings.simplefilter("error", fxmem.FxmemWarning)
            close(net(ids()), plain(ids()))
        with pytest.raises(IndexError):
            net(ids() + VOCAB)
