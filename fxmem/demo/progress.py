"""Progress bars of the demo: one line per setup."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fxmem.demo.worker import SETUPS
from fxmem.measure.subprocess_job import OK
from fxmem.optional import require

if TYPE_CHECKING:
    from fxmem.demo.options import Demo

Watch = Callable[[str], Callable[[dict[str, Any]], None]]


@contextmanager
def follow(console: Any, demo: Demo) -> Iterator[Watch]:
    """Show a bar for every setup; the yielded function gives the message handler of one."""
    bars = require("rich.progress")
    columns = (
        bars.TextColumn("{task.description:<14}"),
        bars.BarColumn(),
        bars.TextColumn("{task.fields[doing]:<28}"),
        bars.TimeElapsedColumn(),
    )
    with bars.Progress(*columns, console=console) as progress:
        # One more than the steps: the recorded pass at the end.
        lines = {
            name: progress.add_task(
                SETUPS[name], total=demo.steps + 1, doing="waiting", start=False
            )
            for name in demo.setups
        }

        def watch(setup: str) -> Callable[[dict[str, Any]], None]:
            line = lines[setup]
            progress.start_task(line)
            return lambda message: _show(progress, line, message, demo.steps)

        yield watch


def _show(progress: Any, line: Any, message: dict[str, Any], steps: int) -> None:
    event = message.get("event")
    if event == "end":
        doing = "done" if message["status"] == OK else f"[red]{message['status']}"
        progress.update(line, doing=doing)
        if message["status"] == OK:
            progress.update(line, completed=steps + 1)
        progress.stop_task(line)
    elif event == "step":
        done = message["step"]
        doing = f"step {done} of {steps}, loss {message['loss']:.3f}"
        progress.update(line, completed=done, doing=doing)
    elif event in _DOING:
        progress.update(line, doing=_DOING[event].format(steps=steps))


_DOING = {
    "loading": "loading the model",
    "training": "step 1 of {steps}",
    "peak": "measuring the peak",
    "recording": "recording memory",
}
