"""A streamed step behaves like any other: accumulation, autocast, hooks, errors, lengths."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from double import largest_difference
from torch import nn

import fxmem
from fxmem import Plan, Stream
from fxmem import errors as err

PLAN = Plan(stream=Stream(chunk=7, loss_chunk=5))


def streamed(name: str = "llama", **changes: Any) -> nn.Module:
    return fxmem.transform(tiny.model(name, **changes), PLAN)


@pytest.fixture(scope="module")
def shared() -> nn.Module:
    return streamed()


@pytest.fixture
def net(shared: nn.Module) -> Iterator[nn.Module]:
    """A streamed model that other tests use as well: its capture takes longer than they do."""
    shared.zero_grad()
    yield shared
    shared.train().requires_grad_(True)


def test_no_new_work_for_new_lengths() -> None:
    net = streamed()
    tiny.step(net, tiny.batch(2, 23))
    before = fxmem.explain(net)
    for size, length in ((2, 31), (3, 40), (4, 9), (5, 64)):
        tiny.step(net, tiny.batch(size, length))
    after = fxmem.explain(net)
    assert after.captures == before.captures == 1
    assert after.traces == before.traces
    assert after.distinct_programs == before.distinct_programs <= 4


def test_gradient_accumulation_and_two_forwards_before_backward(net: nn.Module) -> None:
    plain = tiny.model()
    a, b = tiny.batch(2, 23), tiny.batch(3, 19)
    for module in (plain, net):
        losses = [module(**x).loss for x in (a, b)]
        sum(losses).backward()
        (module(**a).loss / 3).backward()
    want = {n: p.grad for n, p in plain.named_parameters()}
    got = {n: p.grad for n, p in net.named_parameters()}
    assert largest_difference(got, want)[0] < 1e-5


def test_autocast() -> None:
    plain, net = tiny.model(), streamed()
    grads = []
    for module in (plain, net):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = module(**tiny.batch()).loss
        loss.backward()
        grads.append({n: p.grad for n, p in module.named_parameters()})
    assert largest_difference(grads[1], grads[0])[0] < 0.1
    assert all(g.dtype == torch.float32 for g in grads[1].values())


def test_grad_scaler_scales_once(net: nn.Module) -> None:
    _, want = tiny.step(net, tiny.batch())
    want = {n: g.clone() for n, g in want.items()}
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    net.zero_grad()
    scaler.scale(net(**tiny.batch()).loss).backward()
    got = {n: p.grad / 1024 for n, p in net.named_parameters()}
    assert largest_difference(got, want)[0] < 1e-6


def test_parameter_hooks_fire_once(net: nn.Module) -> None:
    seen: list[str] = []
    handles = [
        p.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
        for name, p in net.named_parameters()
    ]
    tiny.step(net, tiny.batch())
    for handle in handles:
        handle.remove()
    assert sorted(seen) == sorted(n for n, _ in net.named_parameters())


def test_evaluation_and_generation_in_between(net: nn.Module) -> None:
    plain = tiny.model()
    tiny.step(net, tiny.batch())
    ids = tiny.batch(1)["input_ids"]
    with torch.no_grad():
        got, want = (model.eval()(input_ids=ids).logits for model in (net, plain))
    assert (got.cpu() - want).abs().max() < 1e-6
    out = net.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape[1] == ids.shape[1] + 4
    tiny.step(net.train(), tiny.batch())


def test_state_dict_and_class_are_vanilla() -> None:
    plain, net = tiny.model(), streamed()
    assert list(net.state_dict()) == list(plain.state_dict())
    assert type(net) is type(plain)


def test_frozen_parameters_get_no_gradient(net: nn.Module) -> None:
    plain = tiny.model()
    for module in (plain, net):
        for name, p in module.named_parameters():
            p.requires_grad_("self_attn.q_proj" in name)
    _, want = tiny.step(plain, tiny.batch())
    _, got = tiny.step(net, tiny.batch())
    assert len(got) == 2
    assert largest_difference(got, want)[0] < 1e-5


def test_retain_graph_gives_the_same_gradients_again(net: nn.Module) -> None:
    net.zero_grad()
    loss = net(**tiny.batch()).loss
    loss.backward(retain_graph=True)
    once = {n: p.grad.clone() for n, p in net.named_parameters()}
    loss.backward()
    twice = {n: p.grad / 2 for n, p in net.named_parameters()}
    assert largest_difference(twice, once)[0] < 1e-5


def test_backward_twice(net: nn.Module) -> None:
    loss = net(**tiny.batch()).loss
    loss.backward()
    with pytest.raises(err.BackwardTwiceError):
        loss.backward()


def test_double_backward(net: nn.Module) -> None:
    loss = net(**tiny.batch()).loss
    with pytest.raises(err.DoubleBackwardError):
        loss.backward(create_graph=True)


def test_parameter_changed_between_forward_and_backward(net: nn.Module) -> None:
    loss = net(**tiny.batch()).loss
    weight = net.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(err.ModifiedParameterError):
        loss.backward()
    with torch.no_grad():
        weight.div_(2)  # others use the model too


def test_dropped_logits(net: nn.Module) -> None:
    out = net(**tiny.batch())
    assert out.logits.shape == (2, 23, tiny.VOCAB)
    with pytest.raises(err.DroppedLogitsError, match="keep"):
        out.logits.sum()


def test_kept_logits() -> None:
    plain = tiny.model()
    keep = Plan(stream=Stream(chunk=7, loss_chunk=5, logits="keep"))
    net = fxmem.transform(tiny.model(), keep)
    want, got = plain(**tiny.batch()), net(**tiny.batch())
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-5)
    got.loss.backward()
    want.loss.backward()
    grads = [{n: p.grad for n, p in m.named_parameters()} for m in (net, plain)]
    assert largest_difference(*grads)[0] < 1e-5


def test_an_exception_leaves_no_state(net: nn.Module) -> None:
    _, want = tiny.step(net, tiny.batch())
    want = {n: g.clone() for n, g in want.items()}
    handle = net.model.norm.weight.register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tiny.step(net, tiny.batch())
    handle.remove()
    _, got = tiny.step(net, tiny.batch())
    assert largest_difference(got, want)[0] == 0.0


def test_the_model_can_be_collected() -> None:
    net = streamed()
    tiny.step(net, tiny.batch())
    alive = weakref.ref(net)
    del net
    gc.collect()
    torch.compiler.reset()
    gc.collect()
    assert alive() is None


def test_any_number_of_models_in_one_process() -> None:
    """Models of one class share their code, for whose captures Dynamo has a limit."""
    with torch._dynamo.config.patch(accumulated_recompile_limit=2):
        for _ in range(4):
            tiny.step(streamed(), tiny.batch(1))


def test_dropout_replays_the_same_mask() -> None:
    net = streamed("gpt2", resid_pdrop=0.5, embd_pdrop=0.1)
    torch.manual_seed(3)
    first = tiny.step(net, tiny.batch())
    torch.manual_seed(3)
    again = tiny.step(net, tiny.batch())
    assert first[0] == again[0]
    small = fxmem.transform(
        tiny.model("gpt2", resid_pdrop=0.5, embd_pdrop=0.1),
        Plan(stream=Stream(chunk=3, loss_chunk=2)),
    )
    torch.manual_seed(3)
    other = tiny.step(small, tiny.batch())
    assert other[0] == pytest.approx(first[0], rel=1e-5)
    assert largest_difference(other[1], first[1])[0] < 1e-4


def test_unknown_backend_option() -> None:
    with pytest.raises(err.PlanError, match="plans"):
        torch.compile(lambda x: x.sum(), backend="fxmem", options={"plans": PLAN})(
            torch.ones(3, requires_grad=True)
        )


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (x * self.w).sum()
        return y if y.item() > 0 else -y


def test_a_model_that_cannot_be_captured_names_the_reason() -> None:
    # a budget holds for one graph only, so the model is not captured in parts
    net = fxmem.transform(Branching(), Plan(stream=Stream(memory="1GB")))
    with pytest.raises(err.CaptureError, match="item|data-dependent|Data-dependent"):
        net(torch.ones(2, 4))
