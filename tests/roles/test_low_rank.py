"""Low-rank roles: adapters learn beside weights whose own gradient is never formed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from double import everything_in_double, largest_difference
from role_cases import STREAMED, WHOLE, Case, case, deeper, everywhere
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fxmem import Plan
from fxmem import errors as err
from fxmem.roles.roles import Adapter, Role

EXACT = 1e-11
RANK, SCALE = 3, 0.5


def adapters(zero: bool = False, head: bool = False) -> Callable[[nn.Module], Any]:
    """One adapter per matrix of the decoder layers (and of an untied head)."""

    def make(net: nn.Module) -> dict[nn.Parameter, Adapter]:
        torch.manual_seed(5)
        out = {}
        for name, p in net.named_parameters():
            if p.dim() == 2 and ("layers." in name or "h." in name or (head and "lm_head" in name)):
                up = torch.zeros(p.shape[0], RANK) if zero else torch.randn(p.shape[0], RANK)
                out[p] = Adapter(
                    nn.Parameter(up.to(p.dtype)),
                    nn.Parameter(torch.randn(RANK, p.shape[1]).to(p.dtype)), SCALE,
                )  # fmt: skip
        return out

    return make


class Merged(nn.Module):
    """``W + s up down`` as plain autograd would compute it."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.up = nn.Parameter(adapter.up.detach().clone())
        self.down = nn.Parameter(adapter.down.detach().clone())

    def forward(self, weight: Tensor) -> Tensor:
        return weight + SCALE * (self.up @ self.down)


def reference(made: Case) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the merged model; adapters as ``name.up`` and ``name.down``."""
    owner = {n: (m, k) for m_name, m in made.plain.named_modules() for k, _ in
             m.named_parameters(recurse=False) for n in [f"{m_name}.{k}".lstrip(".")]}  # fmt: skip
    plain = {n: p for n, p in made.plain.named_parameters()}
    terms = {}
    for name, p in made.net.named_parameters():
        if (adapter := made.table.adapter(p)) is not None:
            terms[name] = Merged(adapter)
            module, key = owner[name]
            parametrize.register_parametrization(module, key, terms[name])
    loss = made.plain(**tiny.batch()).loss
    loss.backward()
    grads = {n: p.grad for n, p in plain.items() if p.grad is not None}
    for name, term in terms.items():
        grads |= {f"{name}.up": term.up.grad, f"{name}.down": term.down.grad}
    return loss.item(), grads


def learned(made: Case) -> dict[str, Tensor]:
    """Every gradient that the transformed model left, adapters included."""
    out = {}
    for name, p in made.net.named_parameters():
        adapter = made.table.adapter(p)
        for key, q in (("", p), *((("", p),) if adapter is None else
                       ((".up", adapter.up), (".down", adapter.down)))):  # fmt: skip
            if q.grad is not None:
                out[f"{name}{key}"] = q.grad
    return out


def clear(made: Case) -> None:
    for p in made.net.parameters():
        p.grad = None
        if (adapter := made.table.adapter(p)) is not None:
            adapter.up.grad = adapter.down.grad = None


@pytest.mark.parametrize(
    ("name", "plan"), [("llama", STREAMED), ("llama", WHOLE), ("gpt2", STREAMED)]
)
def test_gradients_equal_those_of_the_merged_model(name: str, plan: Plan) -> None:
    with everything_in_double():
        depth = "n_layer" if name == "gpt2" else "num_hidden_layers"
        net = tiny.model(name, **{depth: 3}).double()
        made = case(net, {n: Role.FROZEN for n, _ in net.named_parameters()}, plan,
                    adapters(head=True))  # fmt: skip
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        value, want = reference(made)
        for roles in (deeper(net, 1, Role.LOW_RANK), everywhere(net, 1, Role.LOW_RANK)):
            made.switch(roles)
            clear(made)
            loss = net(**tiny.batch()).loss
            loss.backward()
            got = learned(made)
            assert abs(loss.item() - value) < 1e-12
            assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
            expected = {n for n, r in roles.items() if r is Role.ACTIVE}
            for n, p in net.named_parameters():
                if made.table.adapter(p) is not None and roles[n] is Role.LOW_RANK:
                    expected |= {f"{n}.up", f"{n}.down"}
            assert got.keys() == expected
            assert largest_difference(got, {n: want[n] for n in got})[0] < EXACT


def test_no_program_of_a_low_rank_region_forms_a_gradient_of_its_weights() -> None:
    net = tiny.model("llama", num_hidden_layers=3)
    made = case(net, deeper(net, 0, Role.LOW_RANK), STREAMED, adapters(head=True))
    net(**tiny.batch()).loss.backward()
    for selection in made.graph.selected:
        if not any(r is Role.LOW_RANK for r in selection.roles.values()):
            continue
        code = selection.code
        weights = {tuple(int(d) for d in code.values[i].shape) for i in selection.roles}
        kind = ("loss" if code.is_loss else "backward") + code.variant(selection.wanted)
        program = code.programs[kind, True]
        sums = {tuple(b.shape) for loop in program.loops for b in loop.allocate if b.zero}
        assert not {s for s in weights if len(s) == 2} & sums
        assert any(RANK in s for s in sums)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_weight_that_no_matrix_product_reads_is_refused(name: str) -> None:
    net = tiny.model(name)

    def wrong(net: nn.Module) -> dict[nn.Parameter, Adapter]:
        key = "embed_tokens.weight" if name == "llama" else "experts.gate_up_proj"
        p = next(p for n, p in net.named_parameters() if n.endswith(key))
        up, down = torch.zeros(*p.shape[:-1], 2), torch.zeros(2, p.shape[-1])
        return {p: Adapter(nn.Parameter(up), nn.Parameter(down), 1.0)}

    made = case(net, everywhere(net, 0, Role.LOW_RANK), STREAMED, wrong)
    with pytest.raises(err.RoleError, match="adapter"):
        made.net(**tiny.batch())


def test_bfloat16_weights_take_float32_adapters() -> None:
    net = tiny.model("llama").bfloat16()

    def single(net: nn.Module) -> dict[nn.Parameter, Adapter]:
        return {
            p: Adapter(nn.Parameter(a.up.float()), nn.Parameter(a.down.float()), a.scale)
            for p, a in adapters()(net).items()
        }

    made = case(net, deeper(net, 0, Role.LOW_RANK), STREAMED, single)
    net(**tiny.batch()).loss.backward()
    got = learned(made)
    assert {g.dtype for n, g in got.items() if n.endswith((".up", ".down"))} == {torch.float32}
