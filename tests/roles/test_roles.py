"""Roles: active gradients and in-backward updates equal plain autograd at the old weights."""

from __future__ import annotations

import pytest
import tiny
import torch
from double import everything_in_double, largest_difference
from role_cases import (
    BETA,
    STREAMED,
    WHOLE,
    Case,
    case,
    compare,
    deeper,
    everywhere,
    layer_of,
    step,
)
from torch import nn

import fxmem
from fxmem import Plan
from fxmem import errors as err
from fxmem.roles.roles import Role, RoleTable
from fxmem.runtime.counters import COUNTER

EXACT = 1e-11
PLANS = pytest.mark.parametrize("plan", [STREAMED, WHOLE], ids=["streamed", "whole"])


def double(name: str, layers: int = 3, **changes: object) -> nn.Module:
    if name == "tied":
        name, changes = "llama", {**changes, "tie_word_embeddings": True}
    depth = "n_layer" if name == "gpt2" else "num_hidden_layers"
    return tiny.model(name, **{depth: layers}, **changes).double()


Shared = tuple[Case, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def captured() -> Shared:
    net = double("llama")
    start = {n: v.clone() for n, v in net.state_dict().items()}
    return case(net, everywhere(net, 1), STREAMED), start


@pytest.fixture
def llama(captured: Shared) -> Case:
    """Streamed, of three layers, with the weights of the beginning; one capture serves all."""
    made, start = captured
    for net in (made.plain, made.net):
        net.load_state_dict(start)
        net.zero_grad()
    made.switch(everywhere(made.net, 1))
    return made


@PLANS
@pytest.mark.parametrize(
    "name",
    ["llama", "tied", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2", "mixtral"))],
)
def test_one_step_equals_plain_autograd(name: str, plan: Plan) -> None:
    with everything_in_double():
        net = double(name)
        made = case(net, deeper(net, 1), plan)
        for roles in (deeper(net, 1), everywhere(net, 1)):
            made.switch(roles)
            for _ in range(2):
                assert step(made, tiny.batch(2, 23)) < EXACT
            wanted = sum(r is Role.UPDATE for r in roles.values())
            assert len(made.updated) == 2 * wanted
            assert len(set(made.updated)) == wanted


@pytest.mark.parametrize("plan", ["streamed", pytest.param("whole", marks=pytest.mark.slow)])
def test_regions_below_the_active_block_run_without_autograd(plan: str, llama: Case) -> None:
    made = llama
    with everything_in_double():
        if plan == "whole":
            net = double("llama")
            made = case(net, everywhere(net, 1), WHOLE)
        made.switch(deeper(made.net, 1, Role.FROZEN))
        assert step(made, tiny.batch(2, 23)) < EXACT
    assert made.variants() == ["idle", "idle", "active", "tail", "tail"]
    (active,) = (s for s in made.graph.selected if s.name == "active")
    assert [w for w, leaf in zip(active.wanted, made.graph.calls[2].leaves, strict=True)
            if leaf[0] == "main"] == [False]  # fmt: skip


@PLANS
def test_two_forwards_before_one_backward(plan: Plan) -> None:
    with everything_in_double():
        net = double("tied")
        made = case(net, everywhere(net, 1), plan)
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        for module in (made.plain, made.net):
            losses = [module(**b).loss for b in (tiny.batch(2, 23), tiny.batch(2, 19))]
            (losses[0] + 2 * losses[1]).backward()
        want = {n: p.grad for n, p in made.plain.named_parameters() if p.grad is not None}
        assert compare(made, want, before) < EXACT
    assert len(set(made.updated)) == len(made.updated)
    assert not made.table.waiting


def test_a_dropped_branch_waits_for_the_flush(llama: Case) -> None:
    made, net = llama, llama.net
    with everything_in_double():
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        made.plain(**tiny.batch()).loss.backward()
        dropped = made.net(**tiny.batch(2, 19)).loss
        made.net(**tiny.batch()).loss.backward()
        assert not made.updated and made.table.waiting
        made.table.flush()
        want = {n: p.grad for n, p in made.plain.named_parameters()}
        assert compare(made, want, before) < EXACT
        with pytest.raises(err.ModifiedParameterError):
            dropped.backward()
        assert step(made, tiny.batch()) < EXACT


def test_the_loss_region_updates_with_the_true_tangent(llama: Case) -> None:
    made, net = llama, llama.net
    made.switch(deeper(net, 1))
    with everything_in_double():
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        loss = made.net(**tiny.batch()).loss
        assert not made.updated
        assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
        (loss * 0.125).backward()
        (made.plain(**tiny.batch()).loss * 0.125).backward()
        want = {n: p.grad for n, p in made.plain.named_parameters() if p.grad is not None}
        assert compare(made, want, before) < EXACT


def test_dropout_is_the_same_in_the_recomputation() -> None:
    results = []
    with everything_in_double():
        for plan in (STREAMED, WHOLE):
            net = double("gpt2", 2)
            for m in net.modules():
                if isinstance(m, nn.Dropout):
                    m.p = 0.1
            made = case(net, everywhere(net, 1), plan)
            torch.manual_seed(3)
            net(**tiny.batch()).loss.backward()
            moved = {n: p.detach() for n, p in net.named_parameters()}
            grads = {f"grad {n}": p.grad for n, p in net.named_parameters() if p.grad is not None}
            results.append({**moved, **grads})
            made.plain(**tiny.batch()).loss.backward()
    without = {n: p.grad for n, p in made.plain.named_parameters() if f"grad {n}" in grads}
    assert largest_difference(results[0], results[1])[0] < EXACT
    assert any(not torch.allclose(grads[f"grad {n}"], g, rtol=1e-3) for n, g in without.items())


def _ready(plan: Plan = STREAMED) -> tuple[Case, torch.Tensor]:
    net = tiny.model("llama")
    made = case(net, everywhere(net, 0), plan)
    return made, net(**tiny.batch()).loss


def _snapshot(made: Case) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in made.net.named_parameters()}


def _unchanged(made: Case, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(p, before[n]) for n, p in made.net.named_parameters())


def test_a_second_backward_is_refused_and_moves_nothing() -> None:
    made, loss = _ready()
    loss.backward(retain_graph=True)
    before, calls = _snapshot(made), len(made.updated)
    grads = {n: p.grad.clone() for n, p in made.net.named_parameters() if p.grad is not None}
    with pytest.raises(err.BackwardTwiceError):
        loss.backward()
    assert _unchanged(made, before) and len(made.updated) == calls
    assert all(torch.equal(dict(made.net.named_parameters())[n].grad, g) for n, g in grads.items())


def test_a_gradient_of_a_gradient_is_refused() -> None:
    made, loss = _ready()
    before = _snapshot(made)
    with pytest.raises(err.DoubleBackwardError):
        loss.backward(create_graph=True)
    assert _unchanged(made, before) and not made.updated


def test_a_role_that_needs_a_gradient_of_a_frozen_parameter_is_refused() -> None:
    net = tiny.model("llama")
    net.lm_head.weight.requires_grad_(False)  # type: ignore[union-attr]
    made = case(net, everywhere(net, 0), STREAMED)
    with pytest.raises(err.RoleError, match="update"):
        made.net(**tiny.batch())


def test_an_expert_without_tokens_stays_as_it_is() -> None:
    net = tiny.model("mixtral")
    made = case(net, everywhere(net, 0), STREAMED)
    made.net(**tiny.batch(1, 3)).loss.backward()
    assert made.updated


def test_a_table_without_update_says_so() -> None:
    weight = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(err.RoleError, match="no update"):
        RoleTable({weight: Role.UPDATE}).complete(weight, torch.ones(2, 3))


def test_the_sum_of_all_gradients_is_applied_once() -> None:
    weight, seen = nn.Parameter(torch.zeros(3)), []
    table = RoleTable({weight: Role.UPDATE}, lambda p, g: seen.append(g.clone()))
    for _ in range(3):
        table.expect(weight)
    for k in range(3):
        assert not seen
        table.complete(weight, torch.full((3,), float(k)))
    assert torch.equal(torch.stack(seen), torch.full((1, 3), 3.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_gradient_is_alive_at_a_time_in_one_chunk(name: str, dtype: torch.dtype) -> None:
    """Every matrix of an updated layer is consumed inside the program, after its last reader, and
    none is rounded to the precision of its weight before.
    """
    net = tiny.model(name).to(dtype)
    made = case(net, deeper(net, 0), WHOLE)
    table, seen = made.table, []
    table._update = lambda p, grad: seen.append(grad.dtype)
    net(**tiny.batch(2, 23)).loss.backward()
    assert set(seen) == {torch.float32}
    tail = next(s for s in made.graph.selected if s.updates and not s.code.is_loss)
    programs = [p for (kind, _), p in tail.code.programs.items() if " update " in kind]
    assert programs
    for program in programs:
        left = {i for i in tail.updates if program.outputs[i] is not None}
        assert not {i for i in left if tail.updates[i].dim() > 1}
        assert not any(b.zero and b.name in program.inputs
                       for loop in program.loops for b in loop.allocate)  # fmt: skip


@PLANS
def test_explain_counts_backward_products(plan: Plan) -> None:
    """Units of one layer's dX and dW for the active layer 1..L: L..1 without updates, 2(L-a)+1
    with updates of deeper layers, and no dX at the active region.
    """
    depth = 3
    net = tiny.model("llama", num_hidden_layers=depth)
    made = case(net, deeper(net, 0), plan)
    for other, per_layer in ((Role.FROZEN, 1), (Role.UPDATE, 2)):
        for active in range(depth):
            made.switch(deeper(net, active, other))
            net.zero_grad()
            net(**tiny.batch()).loss.backward()
            programs = COUNTER.programs
            report = fxmem.explain(net)
            assert COUNTER.programs == programs
            layers = report.steps[1:-1]
            units = sum(s.hands_on + bool(s.gradients) for s in layers)
            assert units == per_layer * (depth - active - 1) + 1
            assert [s.variant for s in layers[: active + 1]] == ["idle"] * active + ["active"]
            assert all(s.saved_bytes == 0 for s in report.steps[: active + 1])
            assert all(s.saved_bytes == 2 * 23 * 32 * 4 for s in layers[active:])
    assert "active" in str(report)


def test_explain_names_gradients_and_what_is_alive_at_once() -> None:
    net = tiny.model("llama")
    case(net, deeper(net, 0), WHOLE)
    net(**tiny.batch()).loss.backward()
    tail = fxmem.explain(net).steps[2]
    assert {g.goes for g in tail.gradients} == {"consumed"}
    assert "model.layers.1.mlp.down_proj.weight" in {g.parameter for g in tail.gradients}
    assert tail.live_gradient_bytes == 32 * 48 * 4


class Direct(RoleTable):
    """Plain SGD that the compiler may do itself."""

    calls = 0

    def sgd_rate(self, parameter: nn.Parameter) -> float | None:
        return BETA

    def update(self, parameter: nn.Parameter, grad: torch.Tensor) -> None:
        self.calls += 1
        parameter.sub_(BETA * grad)


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2"])
def test_plain_sgd_adds_products_straight_into_the_weights(name: str) -> None:
    with everything_in_double():
        net = double(name)
        made = case(net, everywhere(net, 1), WHOLE)
        table = Direct(made.table._roles)
        made.table = table
        fxmem.api.use_roles(net, lambda: table)
        for _ in range(2):
            assert step(made, tiny.batch(2, 23)) < EXACT

    updates = sum(r is Role.UPDATE for r in made.roles.values())
    assert 0 < table.calls < 2 * updates


def shared(active: Role, other: Role) -> tuple[nn.Module, dict[str, Role]]:
    """Layers 1 and 2 are the same module."""
    net = double("llama", 4, use_cache=False)
    net.model.layers[2] = net.model.layers[1]  # type: ignore[union-attr,operator,index]
    return net, {n: active if layer_of(n) == 1 else other for n, _ in net.named_parameters()}


@pytest.mark.parametrize("plan", [STREAMED])
def test_a_shared_module_is_updated_once_with_the_sum(plan: Plan) -> None:
    with everything_in_double():
        made = case(*shared(Role.UPDATE, Role.ACTIVE), plan)
        for padding in (None, "left"):
            for update in (True, False):
                one, two = (Role.UPDATE, Role.ACTIVE) if update else (Role.ACTIVE, Role.UPDATE)
                made.switch({n: one if layer_of(n) == 1 else two for n in made.roles})
                assert step(made, tiny.batch(2, 23, padding)) < EXACT
                assert len(set(made.updated)) == len(made.updated)


def test_backwards_of_two_forwards_in_two_calls() -> None:
    with everything_in_double():
        net = double("tied", 2)
        made = case(net, everywhere(net, 1), WHOLE)
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        for module in (made.plain, made.net):
            for loss in [module(**b).loss for b in (tiny.batch(2, 23), tiny.batch(2, 19))]:
                loss.backward()
        want = {n: p.grad for n, p in made.plain.named_parameters()}
        assert compare(made, want, before) < EXACT


def test_without_updates_a_retained_graph_may_run_again() -> None:
    net = tiny.model("llama")
    made = case(net, deeper(net, 0, Role.FROZEN), STREAMED)
    loss = net(**tiny.batch()).loss
    loss.backward(retain_graph=True)
    once = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    loss.backward()
    twice = {n: p.grad / 2 for n, p in net.named_parameters() if p.grad is not None}
    assert largest_difference(twice, once)[0] < 1e-5
    assert made.variants()[:2] == ["idle", "active"]


def test_a_parameter_that_the_model_does_not_use_is_tolerated() -> None:
    net = tiny.model("llama")
    net.model.layers[0].spare = nn.Linear(3, 3)  # type: ignore[union-attr,operator,index]
    made = case(net, everywhere(net, 0), STREAMED)
    net(**tiny.batch()).loss.backward()
    assert made.updated
    assert net.model.layers[0].spare.weight.grad is None  # type: ignore[union-attr,operator,index]


def test_autocast_updates_in_the_precision_of_the_weights() -> None:
    net = tiny.model("llama")
    made = case(net, everywhere(net, 0), STREAMED)
    before = _snapshot(made)
    for module in (made.plain, made.net):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = module(**tiny.batch()).loss
        loss.backward()
    want = {n: p.grad for n, p in made.plain.named_parameters()}
    assert compare(made, want, before) < 0.1


def test_the_role_table_wins_over_inputs_that_require_a_gradient() -> None:
    """Activation checkpointing makes embeddings require a gradient; nothing below learns."""
    net = tiny.model("llama", num_hidden_layers=3)
    net.enable_input_require_grads()  # type: ignore[operator]
    made = case(net, deeper(net, 1), STREAMED)
    net(**tiny.batch()).loss.backward()
    assert made.variants() == ["idle", "idle", "active", "tail", "tail"]


def test_a_loss_outside_the_model_reaches_the_same_updates() -> None:
    with everything_in_double():
        net = double("llama")
        made = case(net, everywhere(net, 1), STREAMED)
        before, inputs = _snapshot(made), tiny.batch()
        for module in (made.plain, made.net):
            logits = module(input_ids=inputs["input_ids"]).logits
            nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
            ).backward()
        want = {n: p.grad for n, p in made.plain.named_parameters()}
        assert compare(made, want, before) < EXACT
