"""Low-rank terms in plain PyTorch: every function that reads a weight reads the sum."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fxmem import errors as err
from fxmem.roles.roles import Adapter
from fxmem.roles.terms import Terms, Uncaptured, leave

Read = Callable[[Tensor, Tensor], Any]
READS: dict[str, Read] = {
    "linear": lambda x, w: F.linear(x, w),
    "linear by name": lambda x, w: F.linear(input=x, weight=w),
    "matmul": lambda x, w: torch.matmul(x, w.t()),
    "operator": lambda x, w: x @ w.T,
    "method": lambda x, w: x.matmul(w.mT),
    "twice turned": lambda x, w: F.linear(x, w.t().transpose(0, 1)),
    "not turned": lambda x, w: F.linear(x, w.permute(0, 1)),
    "mm": lambda x, w: torch.mm(x, w.transpose(0, 1)),
    "addmm": lambda x, w: torch.addmm(x.sum(-1, keepdim=True), x, w.t()),
    "addmm scaled": lambda x, w: torch.addmm(x.sum(-1, keepdim=True), x, w.t(), alpha=2),
    "left": lambda x, w: w @ x.t(),
    "itself": lambda x, w: w @ w.t(),
    "vector": lambda x, w: x[0] @ w.t(),
    "einsum": lambda x, w: torch.einsum("bi,oi->bo", x, w),
    "cast": lambda x, w: F.linear(x.float(), w.float()),
    "rows": lambda x, w: F.linear(x, w[1:3]),
    "norm": lambda x, w: w.norm().item(),
    "data": lambda x, w: x @ w.data.t(),
    "list": lambda x, w: torch.cat([w, w.t().reshape(w.shape)]),
    "vmap": lambda x, w: torch.vmap(lambda row: F.linear(row, w))(x),
    "jvp": lambda x, w: torch.func.jvp(lambda v: F.linear(v, w).tanh(), (x,), (x,))[1],
    "in a tuple": lambda x, w: torch.stack((w, w)).sum(0),
    "form": lambda x, w: (w.shape, w.dtype, w.size(0), w.dim(), w.device, w.numel(), w.is_leaf),
}  # fmt: skip


def adapted(shape: tuple[int, int], rank: int = 2) -> tuple[nn.Parameter, Adapter]:
    up, down = (torch.randn(s, dtype=torch.float64) for s in ((shape[0], rank), (rank, shape[1])))
    weight = torch.randn(shape, dtype=torch.float64)
    return nn.Parameter(weight), Adapter(nn.Parameter(up), nn.Parameter(down), 0.7)


def close(got: Any, want: Any) -> None:
    if isinstance(want, (Tensor, float)):
        loose = {"rtol": 1e-5, "atol": 1e-5} if getattr(want, "dtype", 0) == torch.float32 else {}
        torch.testing.assert_close(got, want, **(loose or {"rtol": 1e-12, "atol": 1e-12}))
    else:
        assert got == want


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of torch.func itself
@given(st.sampled_from(sorted(READS)), st.sampled_from([(4, 4), (5, 3), (4, 1), (6, 2)]))
def test_every_way_to_read_a_weight_reads_the_sum(name: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight, adapter = adapted(shape)
    x = torch.randn(shape[0], shape[1], dtype=torch.float64)
    with torch.no_grad():
        want = READS[name](x, nn.Parameter(weight + 0.7 * adapter.up @ adapter.down))
        with Terms(lambda: {weight: adapter}):
            got = READS[name](x, weight)
    close(got, want)


def test_terms_are_constants() -> None:
    weight, adapter = adapted((3, 2))
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    with Terms(lambda: {weight: adapter}):
        (F.linear(x, weight) + (x @ weight.data.t())).sum().backward()
    full = weight + 0.7 * adapter.up @ adapter.down
    torch.testing.assert_close(x.grad, 2 * full.sum(0).expand(4, 2).detach())
    assert adapter.up.grad is None
    assert adapter.down.grad is None


@pytest.mark.parametrize(
    "write",
    [lambda w: w.add_(1), lambda w: torch.add(w, 1, out=w), lambda w: w.t().zero_()],
    ids=["method", "out", "view"],
)
def test_a_write_is_refused(write: Callable[[Tensor], Any]) -> None:
    weight, adapter = adapted((3, 2))
    before = weight.detach().clone()
    with (
        torch.no_grad(), Terms(lambda: {weight: adapter}),
        pytest.raises(err.RoleError, match="in place"),
    ):  # fmt: skip
        write(weight)
    assert torch.equal(weight, before)


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "attention": (lambda: nn.MultiheadAttention(4, 2), (5, 2, 4)),
    "lstm": (lambda: nn.LSTM(4, 3), (5, 2, 4)),
    "layers": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), (5, 4)),
    "encoder": (lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0), (5, 2, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("training", [True, False])
def test_modules_and_their_parts(name: str, training: bool) -> None:
    make, shape = MODULES[name]
    torch.manual_seed(0)
    net = make().double().train(training)
    merged, x = copy.deepcopy(net), torch.randn(shape, dtype=torch.float64)
    given_ = (x, x, x) if name == "attention" else (x,)
    terms = {}
    for p, q in zip(net.parameters(), merged.parameters(), strict=True):
        if p.dim() == 2:
            _, terms[p] = adapted((p.shape[0], p.shape[1]))
            with torch.no_grad():
                q.add_(0.7 * terms[p].up @ terms[p].down)
    uncaptured = Uncaptured(lambda: terms)
    uncaptured.reach(net, terms)
    with torch.no_grad():
        want, alone = merged(*given_), net(*given_)
        got = uncaptured(net, *given_)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    if name == "layers":  # its parts are called from outside, each with its own term
        torch.testing.assert_close(alone, want, rtol=1e-12, atol=1e-12)
        leave(net)
        with torch.no_grad():
            assert not torch.allclose(net(*given_), want)
