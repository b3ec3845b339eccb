"""Ranks that stream one sequence together: who has which rows, and what they send one another.

The sequence is dealt in twice as many blocks as there are ranks; a rank has one from the front and
its counterpart from the back, so that under a causal mask all have equally much to do. Each region
cuts the blocks into chunks of its own size.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fxmem.errors import DivergedError, LostRankError, PlanError
from fxmem.runtime.ranks import Kind, Placed, Ranks

ALIGNED = 16
"""Bytes between the starts of tensors that are sent together."""
PIECE = 1 << 20
"""Elements that are digested at a time."""


@dataclass(frozen=True, slots=True)
class Group:
    """The ranks along one dimension of a mesh, seen from one of them."""

    name: str
    ranks: dist.ProcessGroup
    rank: int
    count: int
    device: torch.device

    @classmethod
    def of(cls, mesh: Any, name: str) -> Group | None:
        """The ranks of ``mesh`` along ``name``; None where that is one rank.

        Raises:
            PlanError: the mesh has no such dimension, or is none.
        """
        if not _is_mesh(mesh):
            raise PlanError(
                f"Stream.sequence is {name!r}, and mesh is {mesh!r}",
                advice="give the mesh that has this dimension: fxmem.transform(model, plan, "
                f"mesh=init_device_mesh('cuda', (2,), mesh_dim_names=('{name}',)))",
            )
        names = mesh.mesh_dim_names or ()
        if name not in names:
            known = ", ".join(map(repr, names)) or "without names"
            raise PlanError(
                f"the mesh has no dimension {name!r}",
                advice=f"name one of its dimensions in Stream(sequence=...): {known}",
            )
        count = mesh.size(names.index(name))
        if count == 1:
            return None
        device = torch.device(mesh.device_type)
        return cls(name, mesh.get_group(name), mesh.get_local_rank(name), count, device)

    def agree(self, facts: Mapping[str, int], other: int = 0) -> bool:
        """Compare what must be equal on all ranks, before anything else is sent; whether ``other``
        is equal too.

        Raises:
            DivergedError: on every rank, where it is not.
        """
        mine = torch.tensor([*facts.values(), other], dtype=torch.int64, device=self.device)
        all_ = mine.new_empty(self.count * len(mine))
        with self.talking():
            dist.all_gather_single(all_, mine, self.ranks)
        same = (all_.view(self.count, -1) == mine).all(0).tolist()
        if wrong := [fact for fact, equal in zip(facts, same, strict=False) if not equal]:
            raise DivergedError(
                f"the ranks of {self.name!r}, which stream one sequence together, have different "
                + ", ".join(wrong)
            )
        return bool(same[-1])

    @contextlib.contextmanager
    def talking(self) -> Iterator[None]:
        """Names what a collective inside raises."""
        try:
            yield
        except RuntimeError as error:
            text = str(error).split("\n")[0]
            raise LostRankError(f"the ranks of {self.name!r} lost one another: {text}") from error

    def call(self, length: int) -> Call:
        """For a call with a sequence of this length."""
        return Call(self, length)


class Call(Ranks):
    """One call of a group; ``spans`` are the blocks of each rank."""

    def __init__(self, group: Group, length: int) -> None:
        self.group, self.length = group, length
        last = 2 * group.count
        edges = [i * length // last for i in range(last + 1)]
        pairs = [(r, last - 1 - r) for r in range(group.count)]
        self.spans = [[(edges[i], edges[i + 1]) for i in pair] for pair in pairs]
        self.counts = [sum(hi - lo for lo, hi in spans) for spans in self.spans]
        self.rows, self.most = self.counts[group.rank], max(self.counts)

    def chunks(self, chunk: int) -> list[tuple[int, ...]]:
        """See :class:`fxmem.runtime.ranks.Ranks`."""
        found: list[tuple[int, ...]] = []
        at = 0
        for first, end in self.spans[self.group.rank]:
            for lo in range(first, end, chunk):
                hi = min(lo + chunk, end)
                found.append((lo, hi, at))
                at += hi - lo
        return found

    def exchange(
        self, kind: Kind, tensors: list[Tensor], cuts: Sequence[Placed | None],
        shapes: Sequence[tuple[int, ...]],
    ) -> list[Tensor]:  # fmt: skip
        """See :class:`fxmem.program.steps.Exchange`."""
        if kind == "sum":
            return self._sum(tensors)
        known = [c for c in cuts if c is not None]
        if kind == "gather":
            return self._gather(tensors, known, shapes)
        if kind == "scatter":
            return self._scatter(tensors, known)
        return [self._own(t, c) for t, c in zip(tensors, known, strict=True)]

    def _sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        sent = [t.view(torch.uint8) if t.dtype == torch.bool else t for t in tensors]
        with self.group.talking():
            works = [dist.all_reduce(t, group=self.group.ranks, async_op=True) for t in sent]
            for work in works:
                work.wait()
        return list(tensors)

    def _own(self, whole: Tensor, cut: Placed) -> Tensor:
        own, given = self._empty(whole, cut), _rows_first(whole, cut)
        self._deal(_rows_first(own, cut), given, self.group.rank, out=False)
        return own

    def _empty(self, whole: Tensor, cut: Placed) -> Tensor:
        shape = list(whole.shape)
        shape[cut.dim] = cut.outer * self.rows * cut.inner
        return whole.new_empty(shape)

    def _deal(self, own: Tensor, whole: Tensor, rank: int, *, out: bool) -> None:
        """Rows of a rank to (``out``) or from their places in the sequence."""
        at = 0
        for lo, hi in self.spans[rank]:
            source, target = own[at : at + hi - lo], whole[lo:hi]
            (target if out else source).copy_(source if out else target)
            at += hi - lo

    def _gather(
        self, tensors: Sequence[Tensor], cuts: Sequence[Placed], shapes: Sequence[tuple[int, ...]]
    ) -> list[Tensor]:
        """All in one message, as bytes."""
        given = [_rows_first(t, c) for t, c in zip(tensors, cuts, strict=True)]
        sizes = [self.most * _width(g) * g.itemsize for g in given]
        starts, total = [], 0
        for size in sizes:
            starts.append(total)
            total += -(-size // ALIGNED) * ALIGNED
        sent = torch.zeros(total, dtype=torch.uint8, device=tensors[0].device)
        for rows, start in zip(given, starts, strict=True):
            _block(sent, start, rows.shape, rows.dtype).copy_(rows)
        got = sent.new_empty(self.group.count * total)
        with self.group.talking():
            dist.all_gather_single(got, sent, self.group.ranks)
        found = []
        for rows, cut, shape, start in zip(given, cuts, shapes, starts, strict=True):
            whole = torch.empty(shape, dtype=rows.dtype, device=rows.device)
            for rank, count in enumerate(self.counts):
                part = _block(got, rank * total + start, (count, *rows.shape[1:]), rows.dtype)
                self._deal(part, _rows_first(whole, cut), rank, out=True)
            found.append(whole)
        return found

    def _scatter(self, tensors: list[Tensor], cuts: Sequence[Placed]) -> list[Tensor]:
        """One message per type of numbers. The sums are the largest tensors of a layer and go as
        soon as they are packed."""
        found = [self._empty(t, c) for t, c in zip(tensors, cuts, strict=True)]
        views = [_rows_first(t, c) for t, c in zip(found, cuts, strict=True)]
        types = [t.dtype for t in tensors]
        sent = {dtype: self._packed(tensors, cuts, dtype) for dtype in dict.fromkeys(types)}
        tensors.clear()
        for dtype, message in sent.items():
            got = message.new_empty(self.most, message.shape[1])
            with self.group.talking():
                dist.reduce_scatter_single(got, message, group=self.group.ranks)
            own = [v for v, t in zip(views, types, strict=True) if t == dtype]
            parts = got.split([_width(v) for v in own], -1)
            for view, part in zip(own, parts, strict=True):
                view.copy_(part[: self.rows].reshape(view.shape))
        return found

    def _packed(
        self, tensors: Sequence[Tensor], cuts: Sequence[Placed], dtype: torch.dtype
    ) -> Tensor:
        """Rows of rank after rank, tensors of one type beside one another."""
        views = [_rows_first(t, c) for t, c in zip(tensors, cuts, strict=True) if t.dtype == dtype]
        widths = [_width(v) for v in views]
        shape = (self.group.count, self.most, sum(widths))
        sent = torch.zeros(shape, dtype=dtype, device=views[0].device)
        for view, columns in zip(views, sent.split(widths, -1), strict=True):
            for rank in range(self.group.count):
                part = columns[rank].unflatten(-1, view.shape[1:])
                self._deal(part, view, rank, out=False)
        return sent.flatten(0, 1)


def _is_mesh(value: Any) -> bool:
    # not at the top: a build of PyTorch may be without it
    if not dist.is_available():
        return False
    from torch.distributed.device_mesh import DeviceMesh

    return isinstance(value, DeviceMesh)


def _rows_first(x: Tensor, cut: Placed) -> Tensor:
    """A view with the rows of the sequence as its first dimension."""
    rows = x.shape[cut.dim] // (cut.outer * cut.inner)
    shape = (*x.shape[: cut.dim], cut.outer, rows, cut.inner, *x.shape[cut.dim + 1 :])
    return x.reshape(shape).movedim(cut.dim + 1, 0)


def _width(rows: Tensor) -> int:
    return math.prod(rows.shape[1:])


def _block(sent: Tensor, start: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    size = math.prod(shape) * dtype.itemsize
    return sent[start : start + size].view(dtype).view(tuple(shape))


class Whole(torch.autograd.Function):
    """``apply(call, rows, cut)``: the whole of a value that all ranks then use alike, so that each
    has the gradient of its own rows."""

    @staticmethod
    def forward(ctx: Any, call: Call, rows: Tensor, cut: Placed) -> Tensor:
        ctx.call, ctx.cut = call, cut
        shape = (*rows.shape[: cut.dim], call.length, *rows.shape[cut.dim + 1 :])
        return call.exchange("gather", [rows], [cut], [shape])[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        return None, ctx.call.exchange("rows", [grad], [ctx.cut], [grad.shape])[0], None


def digest(*values: Any) -> int:
    """A number that differs where values, in their printed form, differ."""
    return int.from_bytes(hashlib.sha256(repr(values).encode()).digest()[:7])


def content(tensors: Sequence[Tensor]) -> int:
    """A number that differs where the elements of some tensor do, but for rare cases."""
    total = 0
    for x in tensors:
        kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(x.itemsize, torch.int64)
        flat = x.detach().contiguous().flatten().view(kind)
        found = torch.zeros((), dtype=torch.int64, device=x.device)
        for start in range(0, len(flat), PIECE):
            piece = flat[start : start + PIECE].long()
            odd = torch.arange(start, start + len(piece), device=x.device) * 2 + 1
            found += (piece * odd * odd).sum()
        total = (total * 31 + int(found)) % (1 << 62)
    return total


def random_state(device: torch.device) -> int:
    """A number that differs where the states of random generators do."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return content(states)
