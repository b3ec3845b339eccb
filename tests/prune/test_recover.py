"""Recovery: what is learnt is the teacher's distribution, and no ``T x V`` is held for it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from double import everything_in_double
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fxmem
from fxmem import Blocks, PlanError, Stream
from fxmem._compat.measure import memory_events
from fxmem.prune.distill import Teacher
from fxmem.prune.recover import perplexity

CHUNKS = Stream(chunk=16, loss_chunk=16)
PLAN = fxmem.Plan(stream=CHUNKS)


def half(model: nn.Module) -> nn.Module:
    units = fxmem.coupling(model)
    kept = {g.name: tuple(range(0, g.size, 2)) for g in units.groups if g.layer >= 0}
    return fxmem.materialize(model, fxmem.Masks.from_kept(units, kept), units)


def data(count: int, length: int = 23, seed: int = 0) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(tiny.VOCAB, (2, length), generator=g) for _ in range(count)]
    return [{"input_ids": x, "labels": x} for x in ids]


def divergence(own: Tensor, taught: Tensor, weight: Tensor, k: int) -> Tensor:
    """Of all tokens as torch has it; of the `k` largest and all others together."""
    if k == tiny.VOCAB:
        return (F.kl_div(own, taught, log_target=True, reduction="none").sum(-1) * weight).sum()
    top = taught.topk(k).indices
    p, q = (x.gather(-1, top) for x in (taught, own))
    rest, other = ((1 - x.exp().sum(-1)) for x in (p, q))
    return (((p.exp() * (p - q)).sum(-1) + rest * (rest / other).log()) * weight).sum()


@pytest.mark.parametrize(
    ("k", "hidden", "streams"),
    [(tiny.VOCAB, 0, False), (5, 0.3, False), (5, 0, True), (5, 0.3, True)],
)
def test_the_divergence_and_its_gradients_equal_plain_torch(
    k: int, hidden: float, streams: bool
) -> None:
    with everything_in_double():
        dense = tiny.model().double().eval()
        small = half(dense)
        mask = torch.ones(2, 23, dtype=torch.long)
        mask[0, 19:] = 0
        batch = {**data(1)[0], "attention_mask": mask}
        outs = [net(**batch, output_hidden_states=True) for net in (small, dense)]
        own, taught = ((out.logits / 2).log_softmax(-1) for out in outs)
        wanted = 4 * divergence(own, taught.detach(), mask.double() / mask.sum(), k)
        states, right = (out.hidden_states[1:] for out in outs)
        for x, t in zip(states, right, strict=True):
            far = (x - t.detach()).square().mean() / t.detach().square().mean()
            wanted = wanted + hidden * far / len(right)
        want = torch.autograd.grad(wanted, list(small.parameters()))
        for net in (dense, small) if streams else ():
            fxmem.transform(net, PLAN)
        loss = Teacher(dense, k, temperature=2.0, hidden=hidden).loss(small, batch)
        got = torch.autograd.grad(loss, list(small.parameters()))
        assert abs(float(loss.detach()) - float(wanted.detach())) < 1e-10
        assert all(torch.allclose(a, b, 1e-9, 1e-10) for a, b in zip(got, want, strict=True))


def test_a_smaller_model_comes_nearer_to_its_teacher(tmp_path: Path) -> None:
    dense: Any = tiny.model(num_hidden_layers=1, initializer_range=0.3).eval()
    small = half(dense).train()
    before = copy.deepcopy(dense.state_dict())
    rows, seen = data(8), []
    held = [{**b, "labels": dense(**b).logits.argmax(-1).roll(1, -1)} for b in data(2, seed=1)]
    found = fxmem.recover(
        small, dense, rows, steps=24, lr=1e-2, stream=CHUNKS, top_k=8, held_out=held,
        callback=lambda step, loss: seen.append((step, loss)),
    )  # fmt: skip
    assert [loss for _, loss in seen] == list(found.losses) and len(seen) == 24
    assert sum(found.losses[-4:]) < 0.7 * sum(found.losses[:4])
    assert found.before is not None and found.after is not None and found.after < found.before
    assert all(torch.equal(dense.state_dict()[n], p) for n, p in before.items())
    assert small.training and not dense.training
    fxmem.save_pretrained(small, tmp_path)
    again = fxmem.from_pretrained(tmp_path)
    assert perplexity(again, held) == perplexity(small, held) == found.after


def test_no_logits_of_the_teacher_are_held_whole() -> None:
    length, wide = 256, 4096
    dense = tiny.model(vocab_size=wide, max_position_embeddings=length).eval()
    small = half(dense)
    for net in (dense, small):
        fxmem.transform(net, PLAN)
    batch = {"input_ids": torch.randint(wide, (1, length))}
    teacher = Teacher(dense, 8)
    teacher.loss(small, batch).backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        teacher.loss(small, batch).backward()
    largest = max(size for _, size, _ in memory_events(seen))
    weights = dense.get_input_embeddings().weight.nbytes  # as its gradient is
    assert weights <= largest < 4 * length * wide


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"batches": []}, "without batches"),
        ({"blocks": Blocks(frozen=("nothing",))}, "nothing"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    model = tiny.model()
    given = {"small": model, "teacher": copy.deepcopy(model), "batches": data(1), **options}
    with pytest.raises(PlanError, match=message):
        fxmem.recover(**given)
    model(**data(1)[0]).loss.backward()  # an ordinary model again


def test_a_transformed_model_and_another_vocabulary_are_refused() -> None:
    model = tiny.model()
    with pytest.raises(PlanError, match="vocabulary has 50 tokens"):
        Teacher(tiny.model(vocab_size=60)).loss(model, data(1)[0])
    with pytest.raises(PlanError, match="another shape"):
        Teacher(tiny.model(hidden_size=64), hidden=1.0).loss(model, data(1)[0])
    with pytest.raises(PlanError, match="transformed"):
        fxmem.recover(fxmem.transform(model), None, data(1), steps=1)
