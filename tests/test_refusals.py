"""Bad input through the public API: a clear error, and the model is as it was."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmem
from fxmem import FxmemError, Plan, Stream

PLAN = Plan(stream=Stream(chunk=4, loss_chunk=4))
D = 8


class Inner(nn.Module):
    """One step of a model: mixes tokens, then calls ``fn(self, x)``."""

    def __init__(self, fn: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.mix = nn.Linear(D, D)
        self.register_buffer("count", torch.zeros(D))
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        q = self.mix(x).unsqueeze(1)
        x = x + F.scaled_dot_product_attention(q, q, q, is_causal=True).squeeze(1)
        return self.fn(self, x)


class Net(nn.Module):
    def __init__(self, fn: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(11, D), Inner(fn), nn.Linear(D, 11)

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.head(self.block(self.embed(ids)))
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


class Flat(Net):
    """Calls ``fn`` itself: there is no part around it that could run as it is."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q = self.block.mix(x).unsqueeze(1)
        x = x + F.scaled_dot_product_attention(q, q, q, is_causal=True).squeeze(1)
        logits = self.head(self.block.fn(self.block, x))
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


@contextmanager
def unchanged(net: nn.Module, *inputs: Tensor, step: bool = True) -> Iterator[None]:
    """Afterwards parameters, buffers, gradients and inputs are those of before, and after
    ``restore`` a plain step gives what it gave."""
    state = {k: v.clone() for k, v in net.state_dict().items()}
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}
    given = [x.clone() for x in inputs]
    plain = fxmem.restore(copy.deepcopy(net))
    yield
    assert list(net.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    for n, p in net.named_parameters():
        want = grads[n]
        assert (p.grad is None) if want is None else torch.equal(p.grad, want), n
    assert all(torch.equal(a, b) for a, b in zip(inputs, given, strict=True))
    fxmem.restore(net)
    if step:
        a, b = net(*inputs), plain(*inputs)
        a.backward()
        b.backward()
        assert torch.equal(a, b)
        for p, q in zip(net.parameters(), plain.parameters(), strict=True):
            assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)


def writes_a_buffer(block: Any, x: Tensor) -> Tensor:
    block.count.add_(x.mean((0, 1)))  # which would keep the graph of every step
    return x * 2


def writes_a_parameter(block: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        block.mix.weight.mul_(0.5)
    return x


def draws_counts(block: Any, x: Tensor) -> Tensor:
    return x * torch.poisson(x.exp())


def conditional(block: Any, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (x,))


BAD: dict[str, tuple[Callable[[Any, Tensor], Tensor], type[FxmemError], str | None, str]] = {
    "buffer": (writes_a_buffer, fxmem.MutationError, "add_", "gradient to `block.count`"),
    "parameter": (writes_a_parameter, fxmem.MutationError, "mul_", "`block.mix.weight`"),
    "random": (draws_counts, fxmem.UnsupportedOpError, "aten.poisson", "drawn again"),
    "higher order": (conditional, fxmem.UnsupportedOpError, "cond", "higher-order op"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_construct_that_cannot_stream(case: str) -> None:
    fn, error, op, message = BAD[case]
    net, ids = Flat(fn), torch.randint(11, (2, 13))
    fxmem.transform(net, PLAN)
    with (
        unchanged(net, ids, step=case not in ("buffer", "parameter", "random")),
        pytest.raises(error, match=message) as caught,
    ):
        net(ids)
    found = caught.value
    assert found.advice
    assert "test_refusals.py" in str(found)
    if op is not None:
        assert found.op == op
        assert fn.__name__ in (found.source or "")


def test_an_op_without_a_row_is_no_error() -> None:
    net, ids = Net(lambda block, x: x.sort(1).values), torch.randint(11, (2, 13))
    plain = copy.deepcopy(net)
    fxmem.transform(net, PLAN)
    with pytest.warns(fxmem.FxmemWarning, match=r"aten\.sort.* \(block\)"):
        net(ids).backward()
    plain(ids).backward()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    (barrier,) = {b for b in fxmem.explain(net).barriers if "sort" in b.op}
    assert barrier.module == "block"
    assert "test_refusals.py" in barrier.source


def test_a_length_fixed_by_the_model_is_named() -> None:
    constant = torch.randn(13, D)
    net, ids = Net(lambda block, x: x + constant), torch.randint(11, (1, 13))
    plain = copy.deepcopy(net)
    fxmem.transform(net, PLAN)
    with pytest.warns(fxmem.FxmemWarning, match=r"nothing is streamed.*fixed at .*x \+ constant"):
        net(ids).backward()
    plain(ids).backward()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def double_backward(net: nn.Module, loss: Tensor) -> None:
    torch.autograd.grad(loss, list(net.parameters()), create_graph=True)


def second_gradient(net: nn.Module, loss: Tensor) -> None:
    first, *_ = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
    first.sum().backward()


def twice(net: nn.Module, loss: Tensor) -> None:
    wanted = list(net.parameters())
    torch.autograd.grad(loss, wanted)
    torch.autograd.grad(loss, wanted)


MISUSED = {
    "create_graph": (double_backward, fxmem.DoubleBackwardError, "create_graph"),
    "second gradient": (second_gradient, fxmem.DoubleBackwardError, "create_graph"),
    "backward twice": (twice, fxmem.BackwardTwiceError, "retain_graph=True"),
}


@pytest.mark.parametrize("case", MISUSED)
def test_misuse_of_backward(case: str) -> None:
    misuse, error, advice = MISUSED[case]
    net, ids = Net(lambda block, x: x * 2), torch.randint(11, (2, 13))
    fxmem.transform(net, PLAN)
    with unchanged(net, ids), pytest.raises(error, match=advice):
        misuse(net, net(ids))


@pytest.mark.parametrize("which", ["block.mix.weight", "head.weight"])
def test_a_parameter_changed_before_the_backward(which: str) -> None:
    net, ids = Net(lambda block, x: x * 2), torch.randint(11, (2, 13))
    fxmem.transform(net, PLAN)
    loss = net(ids)
    with torch.no_grad():
        net.get_parameter(which).mul_(2)
    # No region has added to a gradient before the error, whichever reads the parameter.
    with unchanged(net, ids), pytest.raises(fxmem.ModifiedParameterError, match=which) as caught:
        loss.backward()
    assert "after backward" in caught.value.advice


def test_a_parameter_that_no_backward_reads_may_change() -> None:
    net, ids = Net(lambda block, x: x * 2), torch.randint(11, (2, 13))
    plain = copy.deepcopy(net)
    fxmem.transform(net, PLAN)
    for model in (net, plain):
        loss = model(ids)
        with torch.no_grad():
            model.embed.weight.mul_(2)
        loss.backward()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_hook_may_step_a_parameter_as_soon_as_its_gradient_is_there() -> None:
    net, ids = Net(lambda block, x: x * 2), torch.randint(11, (2, 13))
    plain = copy.deepcopy(net)
    fxmem.transform(net, PLAN)

    def step(parameter: Tensor) -> None:
        with torch.no_grad():
            parameter.sub_(parameter.grad)

    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    net(ids).backward()
    plain(ids).backward()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q - q.grad)


USES = (
    torch.sum, lambda x: x.tolist(), lambda x: x.max().item(), lambda x: x.numpy(),
    lambda x: x + 1, lambda x: x[0],
)  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_dropped_logits(use: Callable[[Tensor], Any]) -> None:
    net, inputs = tiny.model(), tiny.batch()
    fxmem.transform(net, PLAN)
    out = net(**inputs)
    with pytest.raises(fxmem.DroppedLogitsError, match='logits="keep"'):
        use(out.logits)
    out.loss.backward()


def test_copies_of_dropped_logits_are_dropped_logits() -> None:
    net, inputs = tiny.model(), tiny.batch()
    out = fxmem.transform(net, PLAN)(**inputs)
    logits = out.logits
    copies = [
        logits.clone(), logits.detach(), logits.view_as(logits), logits.contiguous(), logits.cpu(),
        copy.deepcopy(logits), pickle.loads(pickle.dumps(logits)), logits.double(),
        logits.to(torch.bfloat16), torch.ops.aten.alias(logits),
    ]  # fmt: skip
    for made in copies:
        assert made.shape == logits.shape
        with pytest.raises(fxmem.DroppedLogitsError):
            made.sum()
    assert copies[-2].dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Stream(chunk=0), r"Stream\.chunk"),
        (lambda: Stream(chunk="large"), r"Stream\.chunk"),
        (lambda: Stream(loss_chunk=-3), r"Stream\.loss_chunk"),
        (lambda: Stream(logits="some"), r"Stream\.logits"),
        (lambda: Plan(stream=True), r"Plan\.stream"),
    ],
)
def test_an_impossible_plan(make: Callable[[], Any], named: str) -> None:
    with pytest.raises(fxmem.PlanError, match=named):
        make()


def test_not_a_plan_leaves_the_model_alone() -> None:
    net = Net(lambda block, x: x)
    with pytest.raises(fxmem.PlanError, match="Plan"):
        fxmem.transform(net, {"stream": {}})  # type: ignore[arg-type]
    with pytest.raises(fxmem.NotTransformedError):
        fxmem.restore(net)


@pytest.mark.parametrize("options", [{"plans": PLAN}, {"plan": "stream"}])
def test_wrong_backend_options(options: dict[str, Any]) -> None:
    net, ids = Net(lambda block, x: x), torch.randint(11, (2, 13))
    compiled = torch.compile(net, backend="fxmem", options=options)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(fxmem.PlanError, match="plan"):
        compiled(ids)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
