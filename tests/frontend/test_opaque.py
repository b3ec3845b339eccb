"""Parts that cannot be captured run whole, as they are, and everything around them streams."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxmem
from fxmem import FxmemWarning, Plan, Stream

PLAN = Plan(stream=Stream(chunk=5, loss_chunk=4))
D = 8


@dataclasses.dataclass
class Found:
    state: Tensor
    scale: float
    more: dict[str, Tensor] | None = None


class Part(nn.Module):
    """What the model is made of: ``forward`` of a subclass cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Linear(D, D), nn.Parameter(torch.zeros(D))
        self.register_buffer("count", torch.zeros(()))


class Branches(Part):
    def forward(self, x: Tensor) -> Any:
        return self.w(x) if x.sum() > 0 else self.w(-x)


class Counts(Part):
    """Writes to a buffer: a second run would be seen."""

    def forward(self, x: Tensor) -> Any:
        self.count.add_(1 if x.sum() < 1e6 else 2)
        return self.w(x) * self.count.clone()


class Loops(Part):
    def forward(self, x: Tensor) -> Any:
        state, out = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            state = torch.tanh(self.w(x[:, t]) + state)
            out.append(state)
        return torch.stack(out, 1)


class Cubes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy() ** 3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad * 3 * x * x


class Foreign(Part):
    def forward(self, x: Tensor) -> Any:
        return self.w(Cubes.apply(x))


class Clamps(Part):
    """Writes to a parameter."""

    def forward(self, x: Tensor) -> Any:
        self.w.weight.data.clamp_(-0.2, 0.2)
        return self.w(x)


class Selects(Part):
    """Sizes that are values, and random numbers."""

    def forward(self, x: Tensor) -> Any:
        rows = F.dropout(self.w(x[x.detach()[..., 0] > 0]), 0.3)
        return x + rows.sum(0) + self.b


class Tells(Part):
    """Returns more than a tensor, of what it is given by name."""

    def forward(self, x: Tensor, *, scale: float) -> Any:
        top = float(x.detach().abs().max()) > 100
        return Found(self.w(x), scale, {"top": x[..., 0] * top, "id": torch.arange(x.shape[1])})


class Normalizes(Part):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(D)

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.w(x).mT).mT


class Sees(Part):
    """The size of what it gives is the value of a tensor; another method than forward."""

    def look(self, x: Tensor) -> Tensor:
        many = int((x.detach()[:, :, 0] > 0).sum()) % 7 + 1
        return self.w(x[:, :many])

    def forward(self, x: Tensor) -> Any:
        return x + self.look(x).sum(1, keepdim=True)


class Sums(Part):
    """One number."""

    def forward(self, x: Tensor) -> Any:
        return self.w(x).sin().mean() if x.sum() > 0 else self.w(-x).mean()


class Moves(Part):
    """Puts a buffer where its input is, as it goes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Buffer(torch.randn(D).double(), persistent=False)

    def forward(self, x: Tensor) -> Any:
        self.table = self.table.to(device=x.device, dtype=x.dtype)
        return self.w(x) + self.table


KINDS: list[type[Part]] = [
    Branches, Counts, Loops, Foreign, Clamps, Selects, Normalizes, Sees, Tells, Sums, Moves,
]  # fmt: skip


class Layer(nn.Module):
    def __init__(self, part: Part, named: bool) -> None:
        super().__init__()
        self.mix, self.part, self.named = nn.Linear(D, 3 * D), part, named

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x).unsqueeze(1).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        if not self.named:
            return x + torch.tanh(self.part(x))
        found = self.part(x, scale=2.0)
        seen = found.more["top"] + found.more["id"]
        return x + found.state * found.scale + seen.unsqueeze(-1)


class Net(nn.Module):
    """``shared``: all layers have one part, which is called several times."""

    def __init__(self, kind: type[Part], shared: bool = False) -> None:
        super().__init__()
        one = kind()
        parts = [one, one] if shared else [one, kind()]
        self.embed, self.head = nn.Embedding(11, D), nn.Linear(D, 11)
        self.layers = nn.ModuleList(Layer(p, kind is Tells) for p in parts)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def pair(kind: type[Part], *, shared: bool = False) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    net = Net(kind, shared).double()
    return fxmem.transform(copy.deepcopy(net), PLAN), net


def ids_of(length: int, batch: int = 2) -> Tensor:
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(length))


def agree(streamed: nn.Module, plain: nn.Module, ids: Tensor, seed: int = 3) -> None:
    """One step of both: loss, gradients, buffers, parameters and random numbers after it."""
    after = []
    for net in (streamed, plain):
        net.zero_grad()
        torch.manual_seed(seed)
        loss = net(ids)
        after.append((loss.detach(), torch.rand(3)))
        loss.backward()
    (a, drawn), (b, wanted) = after
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert torch.equal(drawn, wanted)
    for (name, p), q in zip(streamed.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)
    for p, q in zip(streamed.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.fixture(autouse=True)
def told() -> Iterator[list[str]]:
    """The warnings of a test about what runs whole."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
        texts += [str(w.message) for w in caught if issubclass(w.category, FxmemWarning)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_that_cannot_be_captured(kind: type[Part]) -> None:
    streamed, plain = pair(kind)
    for length in (13, 13, 22):
        agree(streamed, plain, ids_of(length))
    report = fxmem.explain(streamed)
    # the number of rows that a part takes is one, or the same in both, by chance
    assert report.captures == 1 or kind is Sees
    assert not report.barriers
    method = "part.look" if kind is Sees else "part.norm" if kind is Normalizes else "part"
    assert [p.name for p in report.pieces] == [f"layers.0.{method}", f"layers.1.{method}"]
    assert f"layers.1.{method}" in str(report)
    for module in streamed.modules():
        assert not {"forward", "look"} & set(vars(module))


@pytest.mark.parametrize("examples", [6, pytest.param(40, marks=pytest.mark.slow)])
def test_any_kind_of_part_in_any_setting(examples: int) -> None:
    drawn = given(
        kind=st.sampled_from(KINDS), shared=st.booleans(), lengths=st.lists(
            st.integers(1, 24), min_size=2, max_size=3), batches=st.integers(1, 3),
        train=st.booleans(), hooked=st.booleans(), frozen=st.booleans(),
    )  # fmt: skip
    settings(max_examples=examples, deadline=None)(drawn(_any_setting))()


def _any_setting(
    kind: type[Part], shared: bool, lengths: list[int], batches: int, train: bool, hooked: bool,
    frozen: bool,
) -> None:  # fmt: skip
    streamed, plain = pair(kind, shared=shared)
    seen: list[list[float]] = [[], []]
    for net, record in zip((streamed, plain), seen, strict=True):
        net.train(train)
        net.get_submodule("layers.0.part").w.weight.requires_grad_(not frozen)
        if hooked:
            inner = net.get_submodule("layers.1.part.w")
            inner.register_forward_hook(lambda m, a, out, r=record: r.append(float(out.sum())))
            inner.register_full_backward_hook(lambda m, a, g, r=record: r.append(float(g[0].sum())))
    # a batch norm takes no single value
    for length in (max(n, 2) if kind is Normalizes else n for n in lengths):
        seen[0].clear()
        seen[1].clear()
        agree(streamed, plain, ids_of(length, batches))
        if not isinstance(kind, Sees):
            torch.testing.assert_close(seen[0], seen[1], rtol=1e-10, atol=1e-12)


def test_the_warning_names_part_and_reason_once() -> None:
    streamed, plain = pair(Branches)
    with pytest.warns(
        FxmemWarning, match=r"layers\.0\.part and 1 more like it runs whole.*branching"
    ) as w:
        agree(streamed, plain, ids_of(13))
        agree(streamed, plain, ids_of(22))
    assert len([x for x in w if "runs whole" in str(x.message)]) == 1


def test_what_a_part_raises_leaves_as_itself() -> None:
    class Raises(Branches):
        wrong = False

        def forward(self, x: Tensor) -> Any:
            if self.wrong:
                raise LookupError("of the part")
            return super().forward(x)

    streamed, plain = pair(Raises)
    agree(streamed, plain, ids_of(13))
    Raises.wrong = True
    with pytest.raises(LookupError, match="of the part"):
        streamed(ids_of(13))
    Raises.wrong = False
    agree(streamed, plain, ids_of(13))


def test_a_size_that_was_a_length_by_chance() -> None:
    streamed, plain = pair(Sees)
    agree(streamed, plain, ids_of(D))
    agree(streamed, plain, ids_of(2 * D))
    agree(streamed, plain, ids_of(3))


class Remembers(Branches):
    """Makes what no capture can take, if nobody forbids it."""

    def forward(self, x: Tensor, use_cache: bool = True) -> Any:
        return super().forward(x), object() if use_cache else None


class OfCaches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Remembers()

    def forward(self, x: Tensor, use_cache: bool | None = None) -> Tensor:
        return self.part(x, use_cache=use_cache is not False)[0].square().mean()


def test_a_part_is_recorded_as_the_capture_calls_it() -> None:
    net, x = OfCaches(), torch.randn(2, 9, D)
    want = torch.autograd.grad(net(x), net.part.w.weight)
    fxmem.transform(net, PLAN)
    with pytest.warns(FxmemWarning, match="part runs whole"):
        got = torch.autograd.grad(net(x), net.part.w.weight)
    assert torch.allclose(got[0], want[0])


def test_a_part_that_is_called_later() -> None:
    class Sometimes(Net):
        def forward(self, ids: Tensor, look: bool = False) -> Tensor:
            x = self.embed(ids)
            x = self.layers[1](self.layers[0](x)) if look else x + x.tanh()
            return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())

    torch.manual_seed(0)
    plain = Sometimes(Branches).double()
    streamed = fxmem.transform(copy.deepcopy(plain), PLAN)
    for look in (False, True, False, True):
        a, b = streamed(ids_of(13), look), plain(ids_of(13), look)
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_autocast_holds_inside() -> None:
    seen = []

    class Looks(Branches):
        def forward(self, x: Tensor) -> Any:
            out = super().forward(x)
            seen.append(out.dtype)
            return out.float()

    torch.manual_seed(0)
    streamed = fxmem.transform(Net(Looks), PLAN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        streamed(ids_of(13)).backward()
    assert set(seen) == {torch.bfloat16}


def test_copies_and_pickles_have_parts_of_their_own() -> None:
    streamed, plain = pair(Counts)
    agree(streamed, plain, ids_of(13))
    for made in (copy.deepcopy(streamed), pickle.loads(pickle.dumps(streamed))):
        agree(made, copy.deepcopy(plain), ids_of(13))
        assert fxmem.explain(made).pieces
    agree(streamed, plain, ids_of(22))


def test_the_backward_of_a_part_that_saves_much_runs_it_again() -> None:
    runs = []

    class Heavy(Branches):
        def forward(self, x: Tensor) -> Any:
            runs.append(1)
            for _ in range(9):
                x = torch.sin(x) * torch.cos(x)
            return super().forward(x)

    streamed, plain = pair(Heavy)
    agree(streamed, plain, ids_of(13))
    assert all(p.checkpointed for p in fxmem.explain(streamed).pieces)
    runs.clear()
    streamed(ids_of(13)).backward()
    assert len(runs) == 4


def test_blocks_refuse_a_part_that_runs_as_it_is() -> None:
    torch.manual_seed(0)
    net = fxmem.transform(Net(Branches), Plan(stream=Stream(chunk=5), blocks=fxmem.Blocks()))
    fxmem.BlockAdamW(net, lr=0.1)
    with pytest.raises(fxmem.FxmemError, match="Data-dependent"):
        net(ids_of(13))
