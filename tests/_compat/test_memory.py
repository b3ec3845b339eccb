"""Private names that tell what memory is used."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch.profiler import ProfilerActivity, profile

from fxmem._compat import graph as _compat
from fxmem._compat import measure
from fxmem._compat.measure import memory_events
from fxmem._compat.memory import StorageWatch


def test_memory_events_see_an_allocation_and_its_free() -> None:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as done:
        tensor = torch.empty(12345, dtype=torch.uint8)
        del tensor
    sizes = [size for _, size, device in memory_events(done) if device == "cpu"]
    assert max(sizes) >= 12345
    assert sum(sizes) == 0


def test_memory_events_leave_out_frees_of_what_an_earlier_profile_saw() -> None:
    kept = []
    for _ in range(2):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as done:
            kept.clear()
            kept.append(torch.empty(12345, dtype=torch.uint8))
        sizes = [size for _, size, device in memory_events(done) if device == "cpu"]
        assert sum(sizes) >= 12345 and min(sizes) >= 0


def test_memory_events_know_that_two_blocks_cannot_be_in_one_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The free of the first was in a thread without a profile."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as done:
        pass
    blocks = [(100, 64), (300, 50), (140, 30), (300, -50), (140, -30)]
    events = [
        SimpleNamespace(
            start_time_ns=at,
            extra_fields=SimpleNamespace(device=torch.device("cpu"), ptr=ptr, alloc_size=size),
        )
        for at, (ptr, size) in enumerate(blocks)
    ]
    monkeypatch.setattr(measure, "_allocations", lambda results: events)
    sizes = [size for _, size, _ in memory_events(done)]
    assert sizes == [64, 50, -64, 30, -50, -30]


def test_memory_events_refuse_a_profile_that_did_not_run() -> None:
    with pytest.raises(RuntimeError, match="no recorded events"):
        list(memory_events(profile()))


def test_storage_watch_counts_storages_that_live() -> None:
    with _compat.FakeTensorMode():
        before = torch.empty(10)
        watch = StorageWatch()
        watch.ignore([before])
        with watch:
            kept = before * 2
            kept.view(2, 5)
            dropped = torch.empty(1000)
            del dropped
            before.add_(1)
    assert watch.live == kept.untyped_storage().nbytes() == 40
    assert watch.peak == 4040
    assert watch.owner(kept)[1] == 40
    assert watch.owner(before)[1] == 0


X = torch.tensor([[3, 1, 2], [5, 4, 6]])
SIZED: list[tuple[Any, tuple[Any, ...]]] = [
    (torch.nonzero, (X,)), (torch.masked_select, (X, X > 0)), (torch.masked_select, (X, X[:1] > 0)),
    (torch.bincount, (X.flatten(), None, 9)), (torch.bincount, (X.flatten(), X.flatten() / 2, 9)),
    (torch.repeat_interleave, (torch.arange(4), torch.ones(4, dtype=torch.int64))),
    (torch.unique, (X, True, True, True)), (torch.unique, (X, True, True, True, 0)),
    (torch.unique_consecutive, (X, True, True)), (torch.unique_consecutive, (X, True, True, 1)),
    (torch.Tensor.__getitem__, (X, X > 0)),
]  # fmt: skip


@pytest.mark.parametrize(("op", "args"), SIZED)
def test_sizes_that_depend_on_values_are_the_largest(op: Any, args: tuple[Any, ...]) -> None:
    want = op(*args)  # all elements count, and all differ
    with _compat.FakeTensorMode() as mode:
        given = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
        with StorageWatch():
            got = op(*given)
    results = [r if isinstance(r, tuple) else (r,) for r in (got, want)]
    assert [(g.shape, g.dtype) for g in results[0]] == [(w.shape, w.dtype) for w in results[1]]


def test_storage_watch_asks_what_an_op_needs_inside() -> None:
    with _compat.FakeTensorMode(), StorageWatch(lambda op, args: 7) as watch:
        torch.empty(1)
    assert watch.peak == 11
