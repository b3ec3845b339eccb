"""The private torch names that measuring needs, in one place.

Public profiler results leave out allocations made inside a recorded operator, so the raw event list
is the only source that sees every one of them.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.profiler import profile


def memory_events(finished: profile) -> Iterator[tuple[int, int, str]]:
    """Allocations and frees of a finished profile, in the order in which they were recorded.

    Yields:
        Time in nanoseconds, bytes (negative for a free) and device type in lower case (``"cpu"``).

    Raises:
        RuntimeError: the profile holds no raw events, as when it was not run.
    """
    session = finished.profiler
    results = None if session is None else session.kineto_results
    if results is None:
        raise RuntimeError("the profile has no recorded events; leave its `with` block first")
    for event in results.events():
        if event.name() == "[memory]":
            size = event.nbytes()  # type: ignore[attr-defined]  # missing in torch's own stub
            yield event.start_ns(), size, event.device_type().name.lower()
