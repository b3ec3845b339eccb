"""Any objective streams: plain PyTorch losses in the compiled function, in float64 at 1e-10."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny
import torch
import torch.nn.functional as F
from double import everything_in_double, largest_difference
from torch import Tensor, nn

import fxmem
from fxmem import Plan, Stream

Loss = Callable[[nn.Module, Tensor, dict[str, Tensor]], Tensor]


def log_probs(net: nn.Module, ids: Tensor) -> Tensor:
    """Log-probability of every next token, ``[B, T - 1]``."""
    logits = net(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)


def dpo(net: nn.Module, ids: Tensor, data: dict[str, Tensor]) -> Tensor:
    s = (log_probs(net, ids) * data["mask"]).sum(-1) - data["reference"]
    return -F.logsigmoid(0.1 * (s[:2] - s[2:])).mean()


def grpo(net: nn.Module, ids: Tensor, data: dict[str, Tensor]) -> Tensor:
    lp, mask = log_probs(net, ids), data["mask"]
    ratio = torch.exp(lp - lp.detach())
    gain = torch.min(ratio * data["advantage"], ratio.clamp(0.8, 1.2) * data["advantage"])
    return -(gain * mask).sum() / mask.sum()


def gspo(net: nn.Module, ids: Tensor, data: dict[str, Tensor]) -> Tensor:
    lp, mask, gain = log_probs(net, ids), data["mask"], data["advantage"][:, 0]
    ratio = torch.exp(((lp - lp.detach()) * mask).sum(-1) / mask.sum(-1))
    return -torch.min(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()


def kto(net: nn.Module, ids: Tensor, data: dict[str, Tensor]) -> Tensor:
    s = (log_probs(net, ids) * data["mask"]).sum(-1) - data["reference"]
    kl = s.detach().mean().clamp(min=0)
    good, bad = torch.sigmoid(0.1 * (s[:2] - kl)), torch.sigmoid(0.1 * (kl - s[2:]))
    return (1 - good).mean() + (1 - bad).mean()


def orpo(net: nn.Module, ids: Tensor, data: dict[str, Tensor]) -> Tensor:
    a = (log_probs(net, ids) * data["mask"]).sum(-1) / data["mask"].sum(-1)
    odds = a - torch.log1p(-torch.exp(a))
    return -a[:2].mean() - F.logsigmoid(odds[:2] - odds[2:]).mean()


def distillation(net: nn.Module, ids: Tensor, data: dict[str, Tensor]) -> Tensor:
    logits = net(input_ids=ids, use_cache=False).logits.float()
    return F.kl_div(logits.log_softmax(-1), data["teacher"], log_target=True, reduction="batchmean")


OBJECTIVES: dict[str, tuple[Loss, int]] = {
    "dpo": (dpo, 2),
    "grpo": (grpo, 1),
    "gspo": (gspo, 2),
    "kto": (kto, 2),
    "orpo": (orpo, 2),
    "distillation": (distillation, 1),
}
"""The loss, and how many loops over the chunks its region needs."""


def batch() -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(2)
    ids = torch.randint(0, tiny.VOCAB, (4, 23))
    data = {
        "mask": (torch.rand(4, 22) > 0.3).double(),
        "advantage": torch.randn(4, 22).double(),
        "reference": torch.randn(4).double(),
        "teacher": torch.randn(4, 23, tiny.VOCAB).double().log_softmax(-1),
    }
    return ids, data


def gradients(fn: Callable[[Tensor], Tensor], net: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    loss = fn(ids)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    return {**grads, "loss": loss.detach()}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective(name: str) -> None:
    objective, loops = OBJECTIVES[name]
    with everything_in_double():
        net = tiny.model().double()
        ids, data = batch()

        def fn(ids: Tensor) -> Tensor:
            return objective(net, ids, data)

        want = gradients(fn, net, ids)
        engine = fxmem.backend(Plan(stream=Stream(chunk=7, loss_chunk=5)))
        got = gradients(torch.compile(fn, backend=engine, fullgraph=True), net, ids)
    difference, at = largest_difference(got, want)
    assert difference <= 1e-10, at
    code = engine.graphs[0].calls[-1].code
    assert len(code.program("loss").loops) == loops
    assert not any(call.code.barriers for call in engine.graphs[0].calls)


def test_reference_model_inside() -> None:
    with everything_in_double():
        net, reference = tiny.model().double(), tiny.model().double().requires_grad_(False)
        ids, data = batch()

        def fn(ids: Tensor) -> Tensor:
            with torch.no_grad():
                base = (log_probs(reference, ids) * data["mask"]).sum(-1)
            return dpo(net, ids, {**data, "reference": base})

        want = gradients(fn, net, ids)
        engine = fxmem.backend(Plan(stream=Stream(chunk=7, loss_chunk=5)))
        got = gradients(torch.compile(fn, backend=engine, fullgraph=True), net, ids)
    assert largest_difference(got, want)[0] <= 1e-10
