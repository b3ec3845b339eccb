"""Lower precision: bf16 gradients against float64, and mixture-of-experts models as configured."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from double import everything_in_double, largest_difference
from torch import Tensor
from torch.nn.functional import cross_entropy

import fxmem
from fxmem import Plan, Stream
from fxmem.kernels import token_nll


def streamed(
    net: torch.nn.Module, inputs: dict[str, Tensor], chunk: int
) -> tuple[float, dict[str, Tensor]]:
    fxmem.transform(net, Plan(stream=Stream(chunk=chunk, loss_chunk=chunk)))
    result = tiny.step(net, inputs)
    fxmem.restore(net)
    return result


def squared_errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    return {n: float((got[n].double() - w).square().sum()) for n, w in want.items()}


def drawn(net: torch.nn.Module, base: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Weights near ``base`` for ``net``, the norms' included, and a batch of 400 tokens."""
    torch.manual_seed(seed)
    net.load_state_dict({n: v + torch.randn_like(v) * 0.03 for n, v in base.items()})
    ids = torch.randint(tiny.VOCAB, (1, 400))
    return {"input_ids": ids, "labels": ids.clone()}


@pytest.mark.parametrize("chunk", [2, 64])
def test_bf16_error_is_that_of_plain_bf16(chunk: int) -> None:
    """Of all parameters together, and of each one over several draws: one draw of a norm's 32
    numbers says little."""
    net = tiny.model(max_position_embeddings=512).bfloat16()
    base = {n: v.clone() for n, v in net.state_dict().items()}
    twin = copy.deepcopy(net)
    fxmem.transform(twin, Plan(stream=Stream(chunk=chunk, loss_chunk=chunk)))
    errors: dict[str, list[float]] = {}
    for seed in range(6):
        inputs = drawn(net, base, seed)
        twin.load_state_dict(net.state_dict())
        with everything_in_double():
            _, exact = tiny.step(copy.deepcopy(net).double(), inputs)
        ours = squared_errors(tiny.step(twin, inputs)[1], exact)
        plain = squared_errors(tiny.step(net, inputs)[1], exact)
        for name in exact:
            total = errors.setdefault(name, [0.0, 0.0])
            total[0] += ours[name]
            total[1] += plain[name]
    both = [sum(column) for column in zip(*errors.values(), strict=True)]
    assert both[0] <= 1.1**2 * both[1]
    ratios = {name: (a / b) ** 0.5 for name, (a, b) in errors.items()}
    worst = max(ratios, key=ratios.__getitem__)
    assert ratios[worst] <= 1.1, (worst, ratios[worst])


class Scaled(torch.nn.Module):
    """As a norm's weight: its gradient is a sum over rows of products in bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).float().sum()


def test_a_bf16_sum_over_chunks_is_rounded_once() -> None:
    """Every chunk's sum is 257, which bf16 does not have: rounded each time, 1 in 257 is lost."""
    net, x = Scaled(), torch.tensor([256.0, 1, 0, 0], dtype=torch.bfloat16).repeat(100)
    fxmem.transform(net, Plan(stream=Stream(chunk=4, loss_chunk=4)))
    net(x.view(1, 400, 1)).backward()
    assert fxmem.explain(net).executed_bodies >= 100
    assert net.weight.grad is not None
    assert torch.equal(net.weight.grad, torch.tensor([25700.0], dtype=torch.bfloat16))


@pytest.mark.parametrize("in_place", [False, True])
def test_float32_losses_over_a_large_vocabulary(in_place: bool) -> None:
    """Logits as a trained model gives them: losses and gradients no worse than PyTorch's own."""
    logits = torch.randn(64, 49152) * 4
    target = torch.randint(49152, (64,))
    logits[::2].scatter_(1, target[::2, None], 25.0)  # half of the rows are almost sure
    exact, ours, plain = (x.clone().requires_grad_() for x in (logits.double(), logits, logits))
    want = cross_entropy(exact, target, reduction="none")
    torch_s = cross_entropy(plain, target, reduction="none")
    want.mean().backward(), torch_s.mean().backward()
    grad = torch.full((64,), 1 / 64)
    with torch.no_grad():
        if in_place:
            got, sums = token_nll.forward_(ours, target, -100)
            back = token_nll.backward_(grad, ours, target, sums, -100)
        else:
            got, lse = token_nll.token_nll(ours, target, -100)
            back = token_nll.backward(grad, ours, target, lse, -100)
    for mine, theirs, true in [(got, torch_s, want), (back, plain.grad, exact.grad)]:
        assert true is not None and theirs is not None
        assert (mine - true).norm() <= 1.1 * (theirs - true).norm()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_default_experts_in_float32(name: str) -> None:
    net = tiny.model(name, default_experts=True)
    assert net.config._experts_implementation != "eager"
    inputs = tiny.batch(3, 23, "mixed")
    loss, want = tiny.step(net, inputs)
    got_loss, got = streamed(net, inputs, 7)
    difference, where = largest_difference(got, want)
    assert difference <= 1e-5, where
    assert abs(got_loss - loss) <= 1e-6 * abs(loss)
