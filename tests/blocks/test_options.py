"""Every option of block training against the updates written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from blocks_cases import (
    LENGTH,
    STREAM,
    VOCAB,
    Adam,
    gradients,
    ids,
    make,
    position,
    small,
    train,
    weights,
)
from torch import Tensor, nn

import fxmem
from fxmem import SGD, BlockAdamW, Blocks, LowRank, Plan, SignSGD, Stream

BETA, LR = 0.1, 0.01
OUTER = ("embed.weight", "norm.weight", "norm.bias", "head.weight")


def blocks_of(names: list[str], outer: str) -> list[set[str]]:
    """The blocks of the small model."""
    layers = [{n for n in names if position(n) == i} for i in range(3)]
    head = {n for n in names if position(n) == 1000}
    if outer == "blocks":
        return [{"embed.weight"}, *layers, head]
    if outer == "attach":
        layers[0].add("embed.weight")
        layers[2] |= head
    return layers


CASES: dict[str, dict[str, Any]] = {
    "badam": {"inactive": None},
    "sign": {"inactive": SignSGD(BETA), "order": "descending"},
    "all, embedding and head are blocks": {
        "inactive": SGD(BETA), "reach": "all", "outer": "blocks",
    },
    "attached": {"inactive": SGD(BETA), "outer": "attach"},
    "frozen": {"inactive": SGD(BETA), "reach": "all", "outer": "frozen"},
    "embedding always, head never": {
        "inactive": SGD(BETA), "always_active": ("embed",), "update_head": False,
    },
    "warmup": {"inactive": SGD(BETA), "warmup_after_switch": 3, "steps": 4},
    "compat": {"inactive": SGD(BETA), "compat": "blockoptimizers"},
    "a frozen norm": {"inactive": SGD(BETA), "reach": "all", "frozen": ("layers.1.norm", "norm")},
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "stream"),
    [*((c, STREAM) for c in CASES), ("sign", None), ("embedding always, head never", None)],
)
def test_steps_are_adamw_and_the_cheap_update(case: str, stream: Any) -> None:
    options = {"order": "ascending", "steps": 2, **CASES[case]}
    net, opt, state = make(stream=stream, **options)
    plain, names = small(), [n for n, _ in net.named_parameters()]
    outer, always = options.get("outer", "inactive"), {"embed.weight"} & _named(options, names)
    blocks = blocks_of(names, outer)
    order = blocks[::-1] if options["order"] == "descending" else blocks
    fixed = set(OUTER) if outer == "frozen" else set()
    fixed |= {n for n in names if n.startswith(tuple(f"{m}." for m in options.get("frozen", ())))}
    if not options.get("update_head", True):
        fixed |= {n for n in names if position(n) == 1000}
    first_short = int("compat" in options)
    adam, kept, seen = Adam(), Adam(), -1
    for step in range(6):
        old = weights(net)
        grads = gradients(plain, old, (1.0, ids(step)))
        visit, inside = divmod(step + first_short, options["steps"])
        if visit != seen:
            adam, seen = Adam(), visit
        active = order[visit % len(order)] - fixed
        assert state.active == active | always
        train(net, opt, [step])
        first = min(position(n) for n in active)
        for n, p in net.named_parameters():
            if n in active | always:
                thin = n.endswith("bias") or (old[n].ndim < 2 and "compat" not in options)
                warm = min(1.0, (inside + 1) / options.get("warmup_after_switch", 1) or 1)
                rule = kept if n in always else adam
                want = rule(n, old[n], grads[n], LR * warm, 0.0 if thin else 0.01)
            elif options["inactive"] is None or n in fixed:
                want = old[n]
            elif options.get("reach") == "all" or position(n) > first:
                sign = isinstance(options["inactive"], SignSGD)
                want = old[n] - BETA * (grads[n].sign() if sign else grads[n])
            else:
                want = old[n]
            torch.testing.assert_close(p.detach(), want, rtol=1e-11, atol=1e-13, msg=f"{step} {n}")
            if want is old[n]:
                assert torch.equal(p, want)


def _named(options: dict[str, Any], names: list[str]) -> set[str]:
    return {n for n in names if n.startswith(tuple(options.get("always_active", ())) or "?")}


def merged_gradients(
    plain: nn.Module, old: dict[str, Tensor], terms: dict[str, dict[str, Tensor]], scale: float,
    x: Tensor,
) -> tuple[float, dict[str, Tensor]]:  # fmt: skip
    """Plain autograd through ``W + scale up down``: gradients of weights, ``W.up``, ``W.down``."""
    leaves = {n: t.clone().requires_grad_() for n, t in old.items()}
    parts = {f"{n}.{k}": v.clone().requires_grad_() for n, t in terms.items() for k, v in t.items()}
    full = {n: p + scale * parts[f"{n}.up"] @ parts[f"{n}.down"] if n in terms else p
            for n, p in leaves.items()}  # fmt: skip
    loss = torch.func.functional_call(plain, full, (x,))
    loss.backward()
    return loss.item(), {n: p.grad for n, p in {**leaves, **parts}.items() if p.grad is not None}


@pytest.mark.parametrize(
    ("reach", "head", "ratio", "stream"),
    [("all", True, 16.0, STREAM), ("all", True, 16.0, None), ("deeper", False, 4.0, STREAM)],
)
def test_low_rank_terms_follow_their_own_adam(
    reach: Any, head: bool, ratio: float, stream: Any
) -> None:
    """Eight steps and three switches: terms of inactive matrices learn by an Adam that counts the
    steps in which they were inactive; the active block's own term stays but takes part.
    """
    plan = LowRank(rank=2, alpha=3.0, lr=0.02, ratio=ratio)
    net, opt, state = make(
        stream=stream, inactive=plan, reach=reach, update_head=head, order="ascending"
    )  # fmt: skip
    plain, scale = small(), 1.5
    terms = {n: {"up": a.up.detach().clone(), "down": a.down.detach().clone()}
             for n, a in state.adapters.items()}  # fmt: skip
    matrices = {n for n, p in net.named_parameters() if p.ndim == 2 and n != "embed.weight"}
    assert terms.keys() == matrices - (set() if head else {"head.weight"})
    assert all(t["up"].count_nonzero() == 0 for t in terms.values())
    want, adam, learn = weights(net), Adam(), Adam()
    for step in range(8):
        active = step // 2 % 3
        if step % 2 == 0:
            adam = Adam()
        value, grads = merged_gradients(plain, want, terms, scale, ids(step))
        loss = net(ids(step))
        assert abs(loss.item() - value) < 1e-12
        loss.backward()
        opt.step()
        net.zero_grad()
        for n, g in grads.items():
            weight, _, part = n.rpartition(".")
            if part in ("up", "down") and weight in terms:
                at = position(weight)
                if at != active and (reach == "all" or at > active):
                    rate = 0.02 * (ratio if part == "up" else 1.0)
                    terms[weight][part] = learn(n, terms[weight][part], g, rate)
            elif position(n) == active:
                want[n] = adam(n, want[n], g, LR, 0.01 if want[n].ndim > 1 else 0.0)
        for n, p in net.named_parameters():
            torch.testing.assert_close(p.detach(), want[n], rtol=1e-11, atol=1e-13, msg=n)
        for n, a in state.adapters.items():
            for part in ("up", "down"):
                got = getattr(a, part).detach()
                torch.testing.assert_close(got, terms[n][part], rtol=1e-11, atol=1e-12, msg=n)
    # an Adam of a term counts the steps in which its matrix was inactive
    counts = {f"{n}.up": opt.state[a.up]["step"]
              for n, a in state.adapters.items() if a.up in opt.state}  # fmt: skip
    assert counts == {k: t for k, (t, _, _) in learn.state.items() if k.endswith(".up")}
    before = net(ids(99)).item()
    assert fxmem.merge_low_rank(net) == len(terms)
    assert net(ids(99)).item() == pytest.approx(before, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "stream"),
    [
        (SGD(1e-3), STREAM),
        (LowRank(rank=2), None),
        pytest.param(SGD(1e-3), None, marks=pytest.mark.slow),
        pytest.param(LowRank(rank=2), STREAM, marks=pytest.mark.slow),
    ],
    ids=["sgd, streamed", "low rank, whole", "sgd, whole", "low rank, streamed"],
)
def test_thirty_blocks_compile_nothing_new(kind: Any, stream: Any) -> None:
    """Blocks 0 and 1 have run all that there is; then all blocks are visited.

    The loss without any role is a program of its own, which the second step is the first to run.
    """
    layers = 30
    net, opt, state = make(
        layers, stream=stream, dtype=torch.float32, inactive=kind, steps=1, order="ascending"
    )
    counts = []
    for step in range(layers + 1):
        assert state.schedule.block(state.step) == step % layers
        train(net, opt, [0])
        report = fxmem.explain(net)
        counts.append((report.captures, report.traces, report.programs, report.compiled.bodies))
    assert len(set(counts[1:])) == 1
    # equal layers share their programs: idle, active and tail
    assert report.distinct_programs == 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", [SGD(1e-3), LowRank(rank=2)], ids=["sgd", "low rank"])
def test_thirty_layers_of_a_llama_compile_nothing_new(kind: Any) -> None:
    layers = 30
    net = tiny.model("llama", num_hidden_layers=layers)
    blocks = Blocks(inactive=kind, steps=1, order="ascending")
    fxmem.transform(net, Plan(stream=Stream(chunk=8, loss_chunk=8), blocks=blocks))
    opt = BlockAdamW(net, lr=1e-3)
    counts = set()
    for _ in range(layers + 1):
        net(**tiny.batch(1, 19)).loss.backward()
        opt.step()
        net.zero_grad()
        report = fxmem.explain(net)
        counts.add((report.captures, report.traces, report.programs))
    assert len(counts) == 1


def test_lengths_and_schedules_build_nothing() -> None:
    net, opt, _ = make(inactive=SGD(1e-3), steps=1, order="ascending")
    schedule: Any = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 20)
    train(net, opt, range(3), schedule)
    before = fxmem.explain(net).programs
    for rows, length in ((2, LENGTH), (3, 17), (2, 25)):
        net(torch.zeros(rows, length, dtype=torch.long) % VOCAB).backward()
        opt.step()
        schedule.step()
        net.zero_grad()
    assert fxmem.explain(net).programs == before


def test_a_scheduler_reaches_inactive_updates() -> None:
    net, opt, _ = make(inactive=SGD(BETA), reach="all")
    torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.0)
    before = weights(net)
    train(net, opt, [0])
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


def test_updates_of_size_zero_are_badam_bit_for_bit() -> None:
    """One block alone is AdamW that starts anew at every visit."""
    ends = []
    for kind in (None, SGD(0.0), SignSGD(0.0), LowRank(rank=2, lr=0.0)):
        net, opt, _ = make(inactive=kind, reach="all", dtype=torch.float32)
        train(net, opt, range(5))
        ends.append(list(net.parameters()))
    for other in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], other, strict=True))
    everything = (("embed", "layers", "norm", "head"),)
    net, opt, _ = make(partition=everything, dtype=torch.float32)
    other = small(dtype=torch.float32)
    for step in range(4):
        if step % 2 == 0:
            groups = [[p for p in other.parameters() if (p.ndim > 1) is w] for w in (True, False)]
            plain = torch.optim.AdamW(
                [{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}], lr=LR
            )
        train(net, opt, [step])
        other(ids(step)).backward()
        plain.step()
        other.zero_grad()
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_defaults_are_those_of_the_papers() -> None:
    """Decoder layers are the blocks; embedding, final norm and head are never active (both papers
    leave them out) but take part in the cheap updates that reach them.
    """
    _, _, state = make(**{"steps": Blocks().steps})
    assert [b.label for b in state.blocks] == ["layers.0", "layers.1", "layers.2"]
    assert set(state.parts.inactive) == set(OUTER)
