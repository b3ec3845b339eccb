"""torch.func and forward-mode differentiation: derivatives that a streamed region does not have."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jvp, stack_module_state, vjp, vmap

import fxmem

D = 6
# torch's own, in forward mode
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")


class Net(nn.Module):
    """Attention by hand: the fused one has no second or forward derivative on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(D, 3 * D), nn.Linear(D, 9)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x).chunk(3, -1)
        seen = torch.ones(x.shape[-2], x.shape[-2]).tril().bool()
        weights = (q @ k.mT).masked_fill(~seen, -1e9).softmax(-1)
        return self.head(x + weights @ v).logsumexp(-1).mean()


X = torch.linspace(-1, 1, 2 * 13 * D, dtype=torch.float64).sin().view(2, 13, D)


def parameters(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in net.named_parameters()}


def by_grad(net: nn.Module) -> Any:
    return grad(lambda p: functional_call(net, p, (X,)))(parameters(net))


def per_sample(net: nn.Module) -> Any:
    one = grad(lambda p, x: functional_call(net, p, (x[None],)))
    return vmap(one, (None, 0))(parameters(net), X)


def ensemble(net: nn.Module) -> Any:
    many, _ = stack_module_state([copy.deepcopy(net) for _ in range(2)])
    return vmap(lambda p: functional_call(net, p, (X,)))(many)


def tangent(net: nn.Module) -> Any:
    return jvp(net, (X,), (X.cos(),))[1]


def cotangent(net: nn.Module) -> Any:
    out, back = vjp(net, X)
    return back(torch.ones_like(out))


def jacobian(net: nn.Module) -> Any:
    return jacfwd(lambda scale: net(X * scale))(torch.ones(D, dtype=torch.float64))


def dual(net: nn.Module) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(net(forward_ad.make_dual(X, X.cos()))).tangent


def dual_without_gradients(net: nn.Module) -> Any:
    with torch.no_grad():
        return dual(net)


WAYS = [by_grad, per_sample, ensemble, tangent, cotangent, jacobian, dual, dual_without_gradients]


@pytest.fixture(autouse=True)
def doubles() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore::fxmem.FxmemWarning")
def test_the_model_runs_as_it_is(way: Callable[[nn.Module], Any]) -> None:
    torch.manual_seed(0)
    plain = Net()
    model = fxmem.transform(copy.deepcopy(plain), fxmem.Plan(stream=fxmem.Stream(chunk=4)))
    got, want = way(model), way(plain)
    assert want is not None and got is not None
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_it_says_so_once_and_streams_afterwards(recwarn: pytest.WarningsRecorder) -> None:
    model = fxmem.transform(Net(), fxmem.Plan(stream=fxmem.Stream(chunk=4)))
    for _ in range(2):
        cotangent(model)
    told = [w for w in recwarn if "runs as plain PyTorch inside" in str(w.message)]
    assert len(told) == 1 and fxmem.explain(model).captures == 0
    model(X).backward()
    assert fxmem.explain(model).captures == 1


def test_a_compiled_model_refuses_forward_mode_by_name() -> None:
    model = torch.compile(Net(), backend="fxmem")
    with pytest.raises(fxmem.DoubleBackwardError, match="forward-mode"):
        dual(model)
