"""The line that a long capture shows on a terminal, and only there."""

from __future__ import annotations

import io
import time

import pytest
import tiny
from rich.console import Console

import fxmem
from fxmem import progress


@pytest.mark.parametrize("terminal", [True, False])
def test_it_names_what_is_done(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100)
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    monkeypatch.setattr(progress, "AFTER", 0.0)
    model = fxmem.transform(tiny.model(use_cache=False))
    model(**tiny.batch(1, 9)).loss.backward()
    assert ("fxmem: " in out.getvalue()) == terminal
    before = out.getvalue()
    model(**tiny.batch(1, 9)).loss.backward()
    assert out.getvalue() == before  # a later step has nothing to say


def test_what_is_quick_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=out, force_terminal=True))
    began: list[float] = []

    class Watch:
        def __init__(self, begin: object) -> None:
            assert callable(begin)
            began.append(time.perf_counter())
            begin()

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    with progress.reported(Watch):
        progress.doing("nothing")
    assert began and not out.getvalue()
