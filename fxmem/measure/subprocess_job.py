"""Run a job in a process of its own and follow its progress.

A high-water mark belongs to a process, so every measured setup gets a fresh one. The job is a
module that ends in ``serve(job)``; it receives a JSON request, prints one JSON object per line
while it works and leaves its result in a file. A job that fails, is killed or runs out of memory
is a result too: the caller's other jobs go on.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fxmem.errors import FxmemError
from fxmem.measure.live import available_bytes

Message = dict[str, Any]
Job = Callable[[Message, Callable[[Message], None]], Message]

OK, FAILED, OUT_OF_MEMORY = "ok", "failed", "out of memory"

_TAIL_CHARACTERS = 2000
_IN_STEP = "--in-step"
_SIGNAL_KILL = -9


def run_isolated(
    module: str,
    request: Mapping[str, Any],
    on_message: Callable[[Message], None] = lambda message: None,
    threads: int | None = None,
    *,
    in_step: bool = False,
) -> Message:
    """Run ``python -m module`` on ``request`` and return its result.

    With ``in_step`` the job waits after every message until ``on_message`` returns, so that the
    caller says when it works on.

    The result always holds ``status``: ``"ok"``, ``"out of memory"`` or ``"failed"``; the latter
    two come with ``reason``, one line, and ``detail``, the end of the job's error output.
    """
    with tempfile.TemporaryDirectory(prefix="fxmem-") as folder:
        asked, answered, errors = (Path(folder) / name for name in ("in.json", "out.json", "err"))
        asked.write_text(json.dumps(dict(request)))
        # -P: a file in the current folder must not hide an installed module.
        command = [sys.executable, "-P", "-m", module, str(asked), str(answered)]
        command += [_IN_STEP] * in_step
        with (
            errors.open("w") as stderr,
            subprocess.Popen(
                command, stdin=subprocess.PIPE if in_step else None, stdout=subprocess.PIPE,
                stderr=stderr, text=True, env=_environment(threads),
            ) as process,
        ):  # fmt: skip
            _follow(process, on_message)
        detail = errors.read_text(errors="replace")[-_TAIL_CHARACTERS:]
        return _result(process.returncode, answered, detail)


def serve(job: Job) -> None:
    """Entry point of a job's module: ``if __name__ == "__main__": serve(job)``."""
    asked, answered = (Path(argument) for argument in sys.argv[1:3])
    emit = _emit_and_wait if _IN_STEP in sys.argv[3:] else _emit
    _limit_memory()
    try:
        result = {"status": OK, **job(json.loads(asked.read_text()), emit)}
    except Exception as error:  # the process ends here; the parent reports what happened
        traceback.print_exc()
        result = {"status": _status_of(error), "reason": _one_line(error)}
    answered.write_text(json.dumps(result))


def _emit(message: Message) -> None:
    print(json.dumps(message), flush=True)


def _emit_and_wait(message: Message) -> None:
    _emit(message)
    if not sys.stdin.readline():
        raise RuntimeError("the process that waits for this one is gone")


def _follow(process: subprocess.Popen[str], on_message: Callable[[Message], None]) -> None:
    assert process.stdout is not None
    try:
        for line in process.stdout:
            # Libraries print to stdout as well; only whole JSON objects are ours.
            with contextlib.suppress(json.JSONDecodeError):
                message = json.loads(line)
                if isinstance(message, dict):
                    on_message(message)
                    if process.stdin is not None:
                        process.stdin.write("\n")
                        process.stdin.flush()
    except BaseException:
        process.kill()
        raise


def _result(code: int, answered: Path, detail: str) -> Message:
    if answered.exists():
        result: Message = json.loads(answered.read_text())
    elif code == _SIGNAL_KILL:
        result = {"status": OUT_OF_MEMORY, "reason": "killed by the system, out of memory"}
    else:
        result = {"status": FAILED, "reason": f"the process ended with exit code {code}"}
    return result if result["status"] == OK else {"detail": detail, **result}


def _environment(threads: int | None) -> dict[str, str]:
    env = dict(os.environ)
    # The child finds what the parent finds, in the same order.
    env["PYTHONPATH"] = os.pathsep.join(str(Path(path or ".").absolute()) for path in sys.path)
    if threads is not None:
        env["OMP_NUM_THREADS"] = str(threads)
    return env


def _limit_memory() -> None:
    """Make an allocation beyond the free memory fail here, before the machine starts to swap."""
    free = available_bytes()
    if free is None:
        return
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if hard == resource.RLIM_INFINITY or free < hard:
            resource.setrlimit(resource.RLIMIT_DATA, (free, hard))


def _status_of(error: Exception) -> str:
    text = str(error).lower()
    refused = "can't allocate memory" in text or "out of memory" in text
    return OUT_OF_MEMORY if refused or isinstance(error, MemoryError) else FAILED


def _one_line(error: Exception) -> str:
    name = "" if isinstance(error, FxmemError) else f"{type(error).__name__}: "
    return name + (" ".join(str(error).split())[:400] or "no message")
