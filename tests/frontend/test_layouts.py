"""How inputs lie in memory changes nothing: results, captures, programs, chunks.

Views (slices of a long text, transposed, expanded, strides of dimensions of one row), one tensor
for two inputs, aliases of one storage; through `transform` and through `torch.compile`. Chunks
follow the shapes of the values they are cut from, not every size that varies.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from double import largest_difference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxmem
from fxmem import Plan, Stream
from fxmem.axes.sizes import has_axis
from fxmem.compiler.step import CompiledGraph
from fxmem.frontend import inputs
from fxmem.frontend.inputs import uniform
from fxmem.runtime.counters import COUNTER
from fxmem.streaming import chunk_size as chunks

D, VOCAB = 8, 13


class Net(nn.Module):
    """Two layers of attention under a padding mask, a state added to them, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(VOCAB, D), nn.Linear(D, VOCAB)
        self.layers = nn.ModuleList(nn.Linear(D, 3 * D) for _ in range(2))
        self.double()

    def forward(self, ids: Tensor, labels: Tensor, mask: Tensor, extra: Tensor) -> Tensor:
        x = self.table(ids) + extra
        at = torch.arange(ids.shape[1])
        seen = (at[:, None] >= at) & (mask[:, None, None, :] | (at[:, None] == at))
        for layer in self.layers:
            q, k, v = (h.unflatten(-1, (2, -1)).transpose(1, 2) for h in layer(x).chunk(3, -1))
            x = x + F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(2)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten().long())


def _sliced(x: Tensor) -> Tensor:
    return torch.cat([x[:, :1], x[:, :1], x, x[:, -1:]], 1)[:, 2:-1]


def _first(x: Tensor) -> Tensor:
    return torch.cat([x, x], 1)[:, : x.shape[1]]


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _every_second(x: Tensor) -> Tensor:
    return torch.stack([x, x], 2).flatten(1, 2)[:, ::2]


def _rows(x: Tensor) -> Tensor:
    return torch.stack([x, x], 1).flatten(0, 1)[::2]


def _of_a_text(x: Tensor) -> Tensor:
    flat = x.reshape(-1)
    return torch.cat([flat[:3], flat])[3:].view(x.shape)


def _odd_stride(x: Tensor) -> Tensor:
    """Where there is one row its stride says nothing."""
    return x.as_strided(x.shape, (999, *x.stride()[1:])) if x.shape[0] == 1 else x


def _numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(x.numpy().copy())


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "fresh": torch.clone, "sliced": _sliced, "first": _first, "transposed": _transposed,
    "every second": _every_second, "rows": _rows, "of a text": _of_a_text,
    "odd stride": _odd_stride, "numpy": _numpy, "view": lambda x: x.clone().view(x.shape),
    "channels last": lambda x: x.flip(-1).flip(-1).movedim(-1, 0).clone().movedim(0, -1),
}  # fmt: skip
CHOICE = st.sampled_from(sorted(LAYOUTS))


@st.composite
def batches(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One batch in drawn layouts, and the same values in new tensors."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(2, 19))
    torch.manual_seed(draw(st.integers(0, 99)))
    ids = LAYOUTS[draw(CHOICE)](torch.randint(VOCAB, (rows, length)))
    kind = draw(st.sampled_from(["own", "same", "shifted", "expanded"]))
    if kind == "shifted":
        text = LAYOUTS[draw(CHOICE)](torch.randint(VOCAB, (rows, length + 1)))
        ids, labels = text[:, :-1], text[:, 1:]
    elif kind == "expanded":
        ids = labels = ids[:1].expand(rows, length)
    else:
        labels = ids if kind == "same" else LAYOUTS[draw(CHOICE)](ids.clone())
    mask = LAYOUTS[draw(CHOICE)](torch.rand(rows, length) < 0.7)
    if draw(st.booleans()):
        mask = mask[:1].expand(rows, length)
    extra = LAYOUTS[draw(CHOICE)](torch.randn(rows, length, D, dtype=torch.float64))
    found = {"ids": ids, "labels": labels, "mask": mask, "extra": extra}
    fresh = {n: t.clone(memory_format=torch.contiguous_format) for n, t in found.items()}
    if draw(st.booleans()):
        for batch in (found, fresh):
            batch["extra"] = batch["extra"].detach().requires_grad_()
    return found, fresh


@pytest.fixture(autouse=True)
def used() -> Iterator[list[CompiledGraph]]:
    """Captures in the order of their calls; automatic chunks have up to 8 tokens."""
    calls: list[CompiledGraph] = []
    call = CompiledGraph.__call__

    def recorded(self: CompiledGraph, *args: Any) -> list[Any]:
        calls.append(self)
        return call(self, *args)

    with (
        mock.patch.object(chunks, "knee", lambda *_: 8),
        mock.patch.object(chunks, "WHOLE_SHARE", 1 << 40),
        mock.patch.object(CompiledGraph, "__call__", recorded),
    ):
        yield calls


def step(net: nn.Module, call: Callable[..., Tensor], batch: dict[str, Tensor]) -> Any:
    """Loss, gradients, and bodies run."""
    net.zero_grad()
    bodies = COUNTER.bodies
    loss = call(**batch)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    grads |= {n: t.grad for n, t in batch.items() if t.grad is not None}
    return {"loss": loss.detach(), **grads}, COUNTER.bodies - bodies


def chunks_of(graph: CompiledGraph) -> list[int]:
    """Of the regions that have the streamed length."""
    return [
        graph.chunk(i) for i, call in enumerate(graph.calls)
        if any(has_axis(d) for n in call.code.joint.inputs for d in call.code.joint.info[n].shape)
    ]  # fmt: skip


def same(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch for another model: what learns has its own gradient, layouts stay."""
    return {n: t.detach().requires_grad_() if t.requires_grad else t for n, t in batch.items()}


def test_transform_knows_no_layouts(used: list[CompiledGraph]) -> None:
    net = Net()
    plain = copy.deepcopy(net)
    fxmem.transform(net, Plan(stream=Stream()))
    net.zero_grad()
    for rows in (1, 2):
        for learns in (False, True):
            extra = torch.zeros(rows, 9, D, dtype=torch.float64, requires_grad=learns)
            ids = torch.zeros(rows, 9, dtype=torch.long)
            step(net, net, {"ids": ids, "labels": ids, "mask": ids == 0, "extra": extra})
    captures = COUNTER.captures

    @settings(max_examples=25)
    @given(batches())
    def check(pair: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
        views, fresh = pair
        want, _ = step(plain, plain, same(views))
        got, bodies = step(net, net, views)
        assert largest_difference(got, want)[0] < 1e-10
        sizes = chunks_of(used[-1])
        got, expected = step(net, net, fresh)
        assert largest_difference(got, want)[0] < 1e-10
        assert (used[-1] is used[-2], bodies, sizes) == (True, expected, chunks_of(used[-1]))
        assert COUNTER.captures == captures

    check()


def test_torch_compile_knows_no_more_programs(used: list[CompiledGraph]) -> None:
    """Dynamo captures a layout it has not seen; nothing is traced or chunked differently."""
    net = Net()
    plain = copy.deepcopy(net)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        call = torch.compile(net, backend=fxmem.backend(), fullgraph=True)
        fresh = batch(2, 17)
        want, _ = step(plain, plain, fresh)
        _, bodies = step(net, call, fresh)
        before = (COUNTER.traces, COUNTER.programs, chunks_of(used[-1]))
        for name, layout in LAYOUTS.items():
            given_ids = layout(fresh["ids"])
            views = {n: layout(t) for n, t in fresh.items()}
            views |= {"ids": given_ids, "labels": given_ids}
            for _ in range(2):
                captures = COUNTER.captures
                got, ran = step(net, call, views)
                assert largest_difference(got, want)[0] < 1e-10, name
                assert ran == bodies, name
                assert (COUNTER.traces, COUNTER.programs, chunks_of(used[-1])) == before, name
            assert COUNTER.captures == captures, name
    assert len({id(g) for g in used}) <= 1 + len(LAYOUTS)


def batch(rows: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(VOCAB, (rows, length))
    extra = torch.randn(rows, length, D, dtype=torch.float64)
    return {"ids": ids, "labels": ids.clone(), "mask": ids > 2, "extra": extra}


def test_one_row_and_one_token_are_captures_of_their_own() -> None:
    """Dynamo takes a size of 1 for a constant; every other size shares one capture."""
    net = Net()
    plain = copy.deepcopy(net)
    fxmem.transform(net, Plan(stream=Stream()))
    shapes = [(2, 9), (3, 17), (1, 9), (1, 4), (2, 5), (1, 17), (7, 2), (2, 1), (5, 1), (1, 1)]
    for (rows, length), new in zip(shapes, [1, 0, 1, 0, 0, 0, 0, 1, 0, 0], strict=True):
        captures = COUNTER.captures
        given = batch(rows, length)
        want, _ = step(plain, plain, given)
        got, _ = step(net, net, given)
        assert largest_difference(got, want)[0] < 1e-10, (rows, length)
        assert COUNTER.captures - captures == new, (rows, length)


def attend(x: Tensor, layer: nn.Linear) -> Tensor:
    q, k, v = (h.unsqueeze(1) for h in layer(x).chunk(3, -1))
    return x + F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)


class Base(nn.Module):
    """What the models below are made of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(VOCAB, D), nn.Linear(D, VOCAB)
        self.layer, self.other = nn.Linear(D, 3 * D), nn.Linear(1, D)
        self.double()

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Choices(Base):
    """Several answers to a question: ids [B, C, T]."""

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = attend(self.table(ids.flatten(0, 1)), self.layer)
        scores = self.head(x).logsumexp(-1).mean(1)
        return F.cross_entropy(scores.view(ids.shape[:2]), labels)


class Encoded(Base):
    """Two lengths: every token reads a source of its own length."""

    def forward(self, ids: Tensor, labels: Tensor, source: Tensor) -> Tensor:
        memory = self.table(source).tanh().unsqueeze(1)
        x = attend(self.table(ids), self.layer)
        x = x + F.scaled_dot_product_attention(x.unsqueeze(1), memory, memory).squeeze(1)
        return self.loss(self.head(attend(x, self.layer)), labels)


class Pictured(Base):
    """An image of any height and width beside the tokens."""

    def forward(self, ids: Tensor, labels: Tensor, image: Tensor) -> Tensor:
        x = self.table(ids) + self.other(image.mean((1, 2)).unsqueeze(-1)).unsqueeze(1)
        return self.loss(self.head(attend(x, self.layer)), labels)


class Shown(Base):
    """One label per image and text, so that the image has more sizes than the tokens."""

    def forward(self, ids: Tensor, labels: Tensor, image: Tensor) -> Tensor:
        x = self.table(ids) + self.other(image.mean((1, 2)).unsqueeze(-1)).unsqueeze(1)
        return F.cross_entropy(self.head(attend(attend(x, self.layer), self.layer)).mean(1), labels)


class Classes(Base):
    """Classes whose number varies; ignored tokens are left out, which must not change it."""

    def forward(self, ids: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
        x = attend(self.table(ids), self.layer)
        return self.loss(torch.cat([self.head(x), x @ classes.T], -1), labels)


class Shifted(Base):
    """One token fewer in the loss than in the model."""

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = attend(self.table(ids), self.layer)
        return self.loss(self.head(x)[:, :-1], labels[:, 1:])


IDS = torch.arange(34).reshape(2, 17) * 5 % VOCAB
IGNORED = torch.where(IDS % 2 == 0, IDS, -100)
BESIDE: dict[str, tuple[type[Base], dict[str, Tensor], int]] = {
    "one": (Shifted, {"ids": IDS, "labels": IDS}, 4),
    "choices": (Choices, {"ids": IDS.reshape(1, 2, 17), "labels": torch.tensor([1])}, 4),
    "four choices": (Choices, {"ids": IDS[:, None].expand(2, 2, 17),
                               "labels": torch.tensor([1, 0])}, 2),
    "source": (Encoded, {"ids": IDS, "labels": IDS, "source": IDS[:, :11]}, 4),
    "image": (Pictured, {"ids": IDS, "labels": IDS,
                         "image": torch.ones(2, 5, 6, dtype=torch.float64)}, 4),
    "one label": (Shown, {"ids": IDS, "labels": torch.tensor([1, 0]),
                          "image": torch.ones(2, 5, 6, dtype=torch.float64)}, 4),
    "classes": (Classes, {"ids": IDS, "labels": IGNORED,
                          "classes": torch.ones(5, D, dtype=torch.float64)}, 4),
    "ignored": (Shifted, {"ids": IDS, "labels": IGNORED}, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_chunks_follow_the_shapes_of_what_is_cut(name: str, used: list[CompiledGraph]) -> None:
    """Eight tokens a chunk, in as many sequences as the state has: no other size counts."""
    kind, given, rows = BESIDE[name]
    net = kind()
    plain = copy.deepcopy(net)
    fxmem.transform(net, Plan(stream=Stream()))
    want, _ = step(plain, plain, given)
    got, _ = step(net, net, given)
    assert largest_difference(got, want)[0] < 1e-10
    assert set(chunks_of(used[-1])) == {rows}
    assert used[-1].sizes["T"] == 17


def test_a_call_sees_and_changes_what_the_caller_gave() -> None:
    """Copies are the call's own: lists and dicts, and what is written, are the caller's."""
    text, page = torch.arange(10.0), torch.zeros(20)
    batch = {"a": text[2:5], "b": [text[5:7], text], "c": (text[7:9],)}
    own = (batch["a"], *batch["b"], *batch["c"])
    with uniform((batch, text[3:4]), {"x": text, "y": page.view(4, 5)}) as (args, kwargs):
        assert args[0] is batch
        tensors = [batch["a"], *batch["b"], *batch["c"], *args[1:], *kwargs.values()]
        assert not any(t.storage_offset() or t._is_view() for t in tensors)
        assert len({id(t) for t in tensors}) == len(tensors)
        batch["a"].mul_(-1)
        batch["b"].pop(0)
        kwargs["y"].add_(100)
    assert [id(t) for t in (batch["a"], *batch["b"], *batch["c"])] == [
        id(t) for t in (own[0], *own[2:])
    ]
    assert text.tolist() == [0, 1, -2, -3, -4, 5, 6, 7, 8, 9]
    assert page.tolist() == [100] * 20


def test_what_is_large_keeps_its_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "COPY_BYTES", 64)
    small, large = torch.zeros(2, 9)[:, :8], torch.zeros(2, 10)[:, :9]
    with uniform((small, large, large.contiguous().view(9, 2)), {}) as (given, _):
        assert [t.is_contiguous() for t in given] == [True, False, True]
        assert given[1] is large
