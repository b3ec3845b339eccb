"""Parts that are there for what they do, not for what they give: all of it happens, once."""

from __future__ import annotations

import copy
import warnings
from collections import deque
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import fxmem

D = 8


class Watches(nn.Module):
    """``.item()`` cannot be captured, so each of these methods runs as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(D))
        self.seen: list[float] = []
        self.last: deque[float] = deque(maxlen=2)
        self.named: dict[str, float] = {}
        self.kinds: set[int] = set()
        self.calls = 0

    def update(self, x: Tensor) -> None:
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean((0, 1)))
        self.note(x)

    def note(self, x: Tensor) -> None:
        value = x.detach().sum().item()
        self.seen.append(value)
        self.last.append(value)
        self.named[f"{self.calls}"] = value
        self.kinds.add(int(value))
        self.calls += 1
        self.found = value

    def unused(self, x: Tensor) -> Tensor:
        self.update(x)
        return self.mean * 2

    def held(self) -> Any:
        return self.seen, self.last, self.named, self.kinds, self.calls, self.found


class Updates(Watches):
    def forward(self, x: Tensor) -> Tensor:
        self.update(x)
        return x - self.mean


class GivesWhatNobodyReads(Watches):
    def forward(self, x: Tensor) -> Tensor:
        self.unused(x)
        return x * 2


class Notes(Watches):
    def forward(self, x: Tensor) -> Tensor:
        self.note(x)
        return torch.tanh(x)


class UpdatesAfter(Watches):
    def forward(self, x: Tensor) -> Tensor:
        out = x - self.mean
        self.update(x)
        return out


class Assigns(Watches):
    """A new tensor takes the buffer's place; another one is there from the second call on."""

    def update(self, x: Tensor) -> None:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 1))
        if self.calls:
            self.register_buffer("late", self.mean * 2)
        self.note(x)

    def forward(self, x: Tensor) -> Tensor:
        self.update(x)
        return x - self.mean


class FindsOtherSizes(Notes):
    """The call starts again after its first part."""

    def rows(self, x: Tensor) -> Tensor:
        return x[x.detach()[..., 0] > 0]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.rows(x).sum(0)


class Scales(Watches):
    """What is made of the buffer alone, before and after it is written."""

    def forward(self, x: Tensor) -> Tensor:
        before = torch.tanh(x * (self.mean.clone() + 1))
        self.update(x)
        return before * torch.exp(self.mean) + torch.tanh(x - self.mean * 0.5)


class WritesLater(Watches):
    """Only from the second call on."""

    def update(self, x: Tensor) -> None:
        if self.calls:
            self.mean.add_(x.detach().mean((0, 1)))
        self.note(x)

    def forward(self, x: Tensor) -> Tensor:
        self.update(x)
        return torch.tanh(x * torch.exp(self.mean))


class Remembers(nn.Module):
    """``look`` cannot be captured, and leaves what others read."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.aux, self.values = 1.0, torch.zeros(()), [2.0]
        self.found: Tensor | None = None
        self.linear = nn.Linear(D, D)

    def look(self, x: Tensor) -> None:
        self.scale = x.detach().abs().mean().item()
        self.aux, self.found = x.square().mean(), x.mean()
        self.values.append(self.scale)


class ReadsANumber(Remembers):
    def forward(self, x: Tensor) -> Tensor:
        self.look(x)
        return self.linear(x) * self.scale


class ReadsATensor(Remembers):
    def forward(self, x: Tensor) -> Tensor:
        self.look(x)
        return self.linear(x) + self.aux


class ReadsWhatWasNone(Remembers):
    def forward(self, x: Tensor) -> Tensor:
        self.look(x)
        assert self.found is not None
        return self.linear(x) + self.found


class ReadsAList(Remembers):
    def forward(self, x: Tensor) -> Tensor:
        self.look(x)
        return self.linear(x) * self.values[-1]


class State:
    def __init__(self) -> None:
        self.scale, self.by_name = 1.0, {"last": 2.0}


class ReadsAnObject(nn.Module):
    """What it holds is not the module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.state, self.linear = State(), nn.Linear(D, D)

    def look(self, x: Tensor) -> None:
        self.state.scale = self.state.by_name["last"] = x.detach().abs().mean().item()

    def forward(self, x: Tensor) -> Tensor:
        self.look(x)
        return self.linear(x) * self.state.scale + self.state.by_name["last"]


class Around(nn.Module):
    """The module around it reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = ReadsANumber()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.inner.aux


class Net(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.embed, self.head, self.part = nn.Embedding(11, D), nn.Linear(D, 11), part
        self.mix = nn.Linear(D, 3 * D)

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids)
        q, k, v = self.mix(self.part(x)).unsqueeze(1).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        logits = self.head(x)
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten()), logits


class InstallsOnce(Watches):
    """As libraries do that add hooks at a first call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def note(self, x: Tensor) -> None:
        super().note(x)
        if not getattr(self, "_installed", False):
            self.linear.register_forward_hook(lambda module, args, out: out * 2)
            self._installed = True

    def forward(self, x: Tensor) -> Tensor:
        self.note(x)
        return self.linear(x)


KINDS = [
    InstallsOnce, Updates, GivesWhatNobodyReads, Notes, UpdatesAfter, Scales, WritesLater, Assigns,
    FindsOtherSizes,
]  # fmt: skip


@pytest.mark.parametrize("logits", ["drop", "keep"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_effect_is_there_once(kind: type[Watches], logits: Any) -> None:
    torch.manual_seed(0)
    plain = Net(kind()).double()
    plan = fxmem.Plan(stream=fxmem.Stream(chunk=5, loss_chunk=4, logits=logits))
    streamed = fxmem.transform(copy.deepcopy(plain), plan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxmem.FxmemWarning)
        agree(streamed, plain)
    for a, b in zip(streamed.part.held(), plain.part.held(), strict=True):  # type: ignore[operator]
        assert a == pytest.approx(b, rel=1e-9) if not isinstance(a, set) else a == b


def test_a_power_iteration_goes_on() -> None:
    """It gives nothing: the weight is made from buffers that it writes."""
    torch.manual_seed(0)
    plain = Net(spectral_norm(nn.Linear(D, D))).double()
    plan = fxmem.Plan(stream=fxmem.Stream(chunk=5, loss_chunk=4))
    streamed = fxmem.transform(copy.deepcopy(plain), plan)
    with pytest.warns(fxmem.FxmemWarning, match="runs whole"):
        agree(streamed, plain)


def agree(streamed: nn.Module, plain: nn.Module) -> None:
    for length in (13, 13, 9):
        ids = torch.randint(11, (2, length), generator=torch.Generator().manual_seed(length))
        for net in (streamed, plain):
            net.zero_grad()
            net(ids)[0].backward()
        for p, q in zip(streamed.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)
        for p, q in zip(streamed.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [Updates, Scales])
def test_a_later_call_does_not_change_what_an_earlier_one_read(kind: type[Watches]) -> None:
    """Plain autograd saves what it made of the buffer; a region makes it again."""
    torch.manual_seed(0)
    plain = Net(kind()).double()
    streamed = fxmem.transform(copy.deepcopy(plain), fxmem.Plan(stream=fxmem.Stream(chunk=5)))
    ids = torch.arange(22).reshape(2, 11) % 11
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxmem.FxmemWarning)
        for net in (streamed, plain):
            first = net(ids)[0]
            with torch.no_grad():
                net(ids.flip(1))
            first.backward()
    for p, q in zip(streamed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "kind", [ReadsANumber, ReadsATensor, ReadsWhatWasNone, ReadsAList, ReadsAnObject, Around]
)
def test_what_is_read_beside_a_part_is_inside_it(kind: type[nn.Module]) -> None:
    """A capture has attributes as they were before the call."""
    torch.manual_seed(0)
    plain = Net(kind()).double()
    streamed = fxmem.transform(copy.deepcopy(plain), fxmem.Plan(stream=fxmem.Stream(chunk=5)))
    with pytest.warns(fxmem.FxmemWarning, match="runs whole"):
        agree(streamed, plain)


class ReadsAtTheTop(Net):
    def forward(self, ids: Tensor) -> Any:
        loss, logits = super().forward(ids)
        return loss + self.part.aux, logits


def test_what_the_model_itself_reads_is_refused() -> None:
    model = fxmem.transform(ReadsAtTheTop(ReadsANumber()))
    with pytest.raises(fxmem.CaptureError, match="changes `aux` of part"):
        model(torch.arange(22).reshape(2, 11) % 11)
    assert model.part.values == [2.0]  # type: ignore[union-attr]


class Caches(nn.Module):
    """A part fills in one attribute of an object of which others are read."""

    def __init__(self) -> None:
        super().__init__()
        self.state, self.linear = State(), nn.Linear(D, D)

    def look(self, x: Tensor) -> Tensor:
        self.state.seen = x.detach().sum().item()  # type: ignore[attr-defined]
        return x * (1 + (self.state.seen > 1e6))  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.look(x)) * self.state.scale


def test_other_attributes_of_the_same_object_may_be_read() -> None:
    torch.manual_seed(0)
    plain = Net(Caches()).double()
    streamed = fxmem.transform(copy.deepcopy(plain), fxmem.Plan(stream=fxmem.Stream(chunk=5)))
    with pytest.warns(fxmem.FxmemWarning, match="part.look runs whole"):
        agree(streamed, plain)
