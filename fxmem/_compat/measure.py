"""The private torch names that measuring needs, in one place.

Public profiler results leave out allocations made inside a recorded operator, so the raw event tree
is the only source that sees every one of them, with its address.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

from torch.profiler import profile


def memory_events(finished: profile) -> Iterator[tuple[int, int, str]]:
    """Allocations and frees of a finished profile, by time.

    Frees on a CPU of what was allocated before the profile are left out. Torch leaves them out only
    where it never saw the address: an allocation of an earlier profile that was freed between the
    two stays in its table, and a block that lies there now is freed with the other one's size.

    What another thread frees, such as one of a process group, leaves no event; such a block is gone
    at the latest when its place is taken by another.

    Yields:
        Time in nanoseconds, bytes (negative for a free) and device type in lower case (``"cpu"``).

    Raises:
        RuntimeError: the profile holds no raw events, as when it was not run.
    """
    session = finished.profiler
    results = None if session is None else session.kineto_results
    if results is None:
        raise RuntimeError("the profile has no recorded events; leave its `with` block first")
    sizes: dict[int, int] = {}
    starts: list[int] = []
    for event in sorted(_allocations(results), key=lambda e: e.start_time_ns):
        block, at = event.extra_fields, event.start_time_ns
        kind, size = block.device.type, block.alloc_size
        if size > 0:
            first = bisect_left(starts, block.ptr)
            if first and starts[first - 1] + sizes[starts[first - 1]] > block.ptr:
                first -= 1
            last = bisect_left(starts, block.ptr + size)
            for start in starts[first:last]:
                yield at, -sizes.pop(start), kind
            starts[first:last] = [block.ptr]
            sizes[block.ptr] = size
        elif block.ptr in sizes:
            size = -sizes.pop(block.ptr)
            del starts[bisect_left(starts, block.ptr)]
        elif kind == "cpu":
            continue
        yield at, size, kind


def _allocations(results: Any) -> Iterator[Any]:
    todo = list(reversed(results.experimental_event_tree()))
    while todo:
        event = todo.pop()
        if event.tag.name == "Allocation":
            yield event
        todo.extend(reversed(event.children))
