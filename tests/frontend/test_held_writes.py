"""What a model writes to its buffers, as plain PyTorch does it, while everything streams."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxmem
from fxmem import Plan, Stream
from fxmem.frontend.attributes import held_values, put_back

D, WORDS = 8, 11
PLAN = Plan(stream=Stream(chunk=5, loss_chunk=4))


class Held(nn.Module):
    """Tensors that writes go to; ``first`` shares memory with ``hits``."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(D))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("hits", torch.zeros(WORDS), persistent=False)
        self.seen, self.calls = torch.zeros(D, dtype=torch.float64), 0
        self.linear = nn.Sequential(nn.Linear(D, D))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.calls += 1
        self.mean.mul_(0.5).add_(x.detach().mean((0, 1)))
        return torch.tanh(self.linear(x - self.mean.clone())) * self.calls / self.steps.clone()


def running_mean(net: Any, x: Tensor, ids: Tensor) -> Tensor:
    with torch.no_grad():
        net.mean.mul_(0.9).add_(x.tanh().mean((0, 1)))
    return x * (1 + net.mean.clone())


def counter(net: Any, x: Tensor, ids: Tensor) -> Tensor:
    before = net.steps.clone()
    net.steps.add_(1)
    return x * before + x.tanh() * net.steps.clone()


def attribute(net: Any, x: Tensor, ids: Tensor) -> Tensor:
    net.calls += 1
    net.seen.data[1:].add_(0.5)
    return x * net.calls + net.seen.clone()


def rows(net: Any, x: Tensor, ids: Tensor) -> Tensor:
    before = net.mean[2:4].clone()
    net.mean[2:4] = x.detach().amax((0, 1))[:2]
    net.mean[:, None][1] = before.sum()
    return x + net.mean.clone()


def counts(net: Any, x: Tensor, ids: Tensor) -> Tensor:
    net.hits.index_add_(0, ids.flatten(), torch.ones_like(ids.flatten(), dtype=net.hits.dtype))
    return x * torch.log1p(net.hits.clone())[ids].unsqueeze(-1)


def rebound(net: Any, x: Tensor, ids: Tensor) -> Tensor:
    net.mean = 0.9 * net.mean + x.detach().mean((0, 1))
    return x * (1 + net.mean)


def shared_memory(net: Any, x: Tensor, ids: Tensor) -> Tensor:
    a = net.first.sum()
    net.hits.add_(F.one_hot(ids.flatten(), WORDS).sum(0))
    b = net.first.clone()
    net.first.mul_(0.5)
    return x * (1 + a.clone()) + b.sum() + net.hits.clone().mean()


def drawn(net: Any, x: Tensor, ids: Tensor) -> Tensor:
    net.seen.normal_()
    return x + net.seen.clone()


def inside(net: Any, x: Tensor, ids: Tensor) -> Tensor:
    for part in net.parts:
        x = x + part(x)
    return x


def around_a_part(net: Any, x: Tensor, ids: Tensor) -> Tensor:
    """The part reads and writes what is written before and after it."""
    net.part.count.add_(1)
    x = net.part(x) * net.part.count.clone()
    net.part.count.add_(x.detach().tanh().mean())
    return x + net.part.count.clone()


class Branches(nn.Module):
    """Cannot be captured, and runs as it is; what it gives has another size now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count.mul_(2 if x.sum() < 1e6 else 3)
        many = int((x[:, :, 0] > 0).sum()) % 7 + 1
        return x + self.count.clone() * x[:, :many].sum(1, keepdim=True)


WRITES = (running_mean, counter, attribute, rows, counts, rebound, shared_memory, drawn, inside,
          around_a_part)  # fmt: skip


class Net(Held):
    def __init__(self, writes: list[Any], loss: bool) -> None:
        super().__init__()
        self.register_buffer("first", self.hits[:3], persistent=False)
        if shared_memory not in writes:
            del self.first
        self.embed, self.head = nn.Embedding(WORDS, D), nn.Linear(D, WORDS)
        self.mix = nn.ModuleList(nn.Linear(D, 3 * D) for _ in writes)
        self.parts = nn.ModuleList(Held() for _ in range(2))
        self.part, self.writes, self.loss = Branches(), writes, loss

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for mix, write in zip(self.mix, self.writes, strict=True):
            x = F.layer_norm(write(self, x, ids), (D,))
            q, k, v = mix(x).unsqueeze(1).chunk(3, -1)
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        logits = self.head(x)
        return loss_of(logits, ids) if self.loss else logits


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def ids_of(length: int) -> Tensor:
    return torch.randint(WORDS, (2, length), generator=torch.Generator().manual_seed(length))


def pair(writes: list[Any], loss: bool = True) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = Net(writes, loss).double()
    if shared_memory in writes:  # `double` makes each a tensor of its own
        plain.first = plain.hits[:3]
    return fxmem.transform(copy.deepcopy(plain), PLAN), plain


def forward(net: Any, ids: Tensor) -> Tensor:
    out: Tensor = net(ids)
    return out if net.loss else loss_of(out, ids)


def same(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            near(p.grad, q.grad)
    for m, n in zip(a.modules(), b.modules(), strict=True):
        for p, q in zip(m._buffers.values(), n._buffers.values(), strict=True):
            near(p, q)
        if isinstance(m, Held):
            near(m.seen, n.seen)  # type: ignore[arg-type]
            assert m.calls == n.calls


def near(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def agree(streamed: Any, plain: Any, lengths: list[int]) -> None:
    names = {id(b) for b in streamed.buffers()}
    for length in lengths:
        losses = []
        for net in (streamed, plain):
            net.zero_grad()
            torch.manual_seed(length)
            # the backward of each uses what was there in its own forward
            first, second = (forward(net, ids_of(n)) for n in (length, length + 2))
            (first + 2 * second).backward()
            losses.append((first.detach(), second.detach()))
        near(*losses)
        same(streamed, plain)
    for net in (streamed, plain):
        torch.manual_seed(1)
        with torch.no_grad():
            float(forward(net, ids_of(9)))
    same(streamed, plain)
    assert rebound in plain.writes or names == {id(b) for b in streamed.buffers()}


@pytest.mark.filterwarnings("ignore::fxmem.FxmemWarning")
@pytest.mark.parametrize("writes", [
    [rows, inside, shared_memory, around_a_part],
    [attribute, around_a_part],
    pytest.param([running_mean, counter, attribute, counts], marks=pytest.mark.slow),
    pytest.param([rebound, drawn], marks=pytest.mark.slow),
])  # fmt: skip
def test_writes_are_those_of_plain_pytorch(writes: list[Any]) -> None:
    streamed, plain = pair(writes)
    agree(streamed, plain, [13])
    report = fxmem.explain(streamed)
    assert [p.name for p in report.pieces] == (["part"] if around_a_part in writes else [])


@pytest.mark.slow
def test_any_writes_in_any_order() -> None:
    @settings(max_examples=12, deadline=None)
    @given(st.lists(st.sampled_from(WRITES), min_size=1, max_size=5), st.booleans(), st.booleans())
    def check(writes: list[Any], loss: bool, train: bool) -> None:
        torch._dynamo.reset()
        streamed, plain = pair(writes, loss)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fxmem.FxmemWarning)
            agree(streamed.train(train), plain.train(train), [13, 9])

    check()


def test_copies_and_states_go_on_from_what_is_there() -> None:
    streamed, plain = pair([running_mean, counter], loss=False)
    agree(streamed, plain, [13])
    assert fxmem.explain(streamed).deferred  # no logits beside the writes at the end
    agree(copy.deepcopy(streamed), copy.deepcopy(plain), [9])
    held = io.BytesIO()
    torch.save(streamed.state_dict(), held)
    held.seek(0)
    for net in (streamed, plain):
        net.load_state_dict(torch.load(held))
        held.seek(0)
    agree(streamed, plain, [7])


class Hands(Net):
    """Returns what it holds, and a view of it."""

    def forward(self, ids: Tensor) -> Any:
        self.mean.add_(1)
        self.steps += 1
        return super().forward(ids), self.mean, self.steps, self.mean[2:]


def test_what_is_returned_is_the_buffer_itself() -> None:
    net = fxmem.transform(Hands([counter], True), PLAN)
    for _ in range(2):
        _, mean, steps, view = net(ids_of(13))
        assert mean is net.mean and steps is net.steps
        assert view.data_ptr() == net.mean[2:].data_ptr()
        assert view.tolist() == net.mean[2:].tolist()


def test_a_number_that_changes_at_every_call_is_captured_twice() -> None:
    streamed, plain = pair([attribute])
    agree(streamed, plain, [9, 10, 11, 12])
    assert fxmem.explain(streamed).captures == 2


def keeps_the_graph(net: Any, x: Tensor, ids: Tensor) -> Tensor:
    net.mean.mul_(0.9).add_(x.mean((0, 1)))
    return x


def test_a_buffer_is_not_made_part_of_autograds_graph() -> None:
    streamed, _ = pair([keeps_the_graph])
    with pytest.raises(fxmem.MutationError, match="with a gradient to `mean`") as caught:
        streamed(ids_of(9))
    assert "keeps_the_graph" in str(caught.value) and "detach" in str(caught.value)
    assert not streamed.mean.any() and not streamed.mean.requires_grad  # type: ignore[operator,union-attr]


def test_what_no_call_can_write_is_not_put_back() -> None:
    net: Any = nn.Linear(2, 2)
    with torch.inference_mode():
        net.cached = torch.ones(3)
    net.spread, net.counted = torch.ones(1).expand(4), torch.zeros(3)
    held = held_values(net)
    net.counted.data.add_(1)
    put_back(held)
    assert net.counted.tolist() == [0, 0, 0] and [t for t, _ in held] == [net.counted]
