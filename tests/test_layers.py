"""The floor plan: rooms in one order, no import upward, no circle of files.

A room is a file at the root of ``fxmem/`` or a folder. Every import counts: at the top of a file,
inside a function, under ``TYPE_CHECKING``, and by way of ``fxmem.passes`` and ``fxmem.kernels``.
"""

from __future__ import annotations

from pathlib import Path

import networkx as nx
import pytest
from sources import ROOT, imports, module_of, package_files

# Lowest first: a file imports from its own room and from rooms that stand before it. Put a new room
# as low as its imports allow.
ROOMS = (
    # what everything may use
    "errors", "checks", "files", "caches", "progress", "optional", "_compat",
    # the languages: sizes and signatures, the table, what a user asks for, what a region runs
    "axes", "rules", "prune.units", "plan", "program", "kernels", "measure",
    # from a model to a program that runs, in the order in which data flows
    "frontend", "rewriting", "streaming", "passes", "runtime", "distributed", "roles", "backends",
    "compiler",
    # what is built on it
    "deferred", "blocks", "prune.coupling", "prune.shrink", "prune.search", "memory",
    "dynamo_backend", "api", "prune", "trainer_callback", "report", "planning", "__init__",
    "demo", "cli", "__main__",
)  # fmt: skip
LEVEL = {room: level for level, room in enumerate(ROOMS)}
FILES = {module_of(file): file for file in package_files()}


def room_of(module: str) -> str:
    """``fxmem.runtime.loops`` is in ``runtime``; a file at the root is a room of its own."""
    file, parts = FILES[module], module.split(".")[1:]
    if not parts:
        return "__init__"
    return ".".join(parts if file.name == "__init__.py" or len(parts) == 1 else parts[:-1])


def read_by(module: str) -> list[tuple[int, str]]:
    """Line and name of every module of ours that a module imports."""
    found = []
    for one in imports(FILES[module]):
        owner = one.name.rpartition(".")[0]
        name = one.name if one.name in FILES else owner
        if name in FILES and name != module:
            found.append((one.line, name))
    return found


@pytest.mark.parametrize("module", sorted(FILES))
def test_no_import_points_up(module: str) -> None:
    room = room_of(module)
    assert room in LEVEL, f"{room} is no room of the plan; add it to ROOMS in {Path(__file__).name}"
    wrong = [
        f"line {line}: {name} is in {room_of(name)}, above {room}"
        for line, name in read_by(module)
        if LEVEL[room_of(name)] > LEVEL[room]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_circle_of_files() -> None:
    graph = nx.DiGraph((a, b) for a in FILES for _, b in read_by(a) if b != "fxmem")
    circles = [sorted(c) for c in nx.strongly_connected_components(graph) if len(c) > 1]
    assert not circles, circles


def test_the_rooms_are_there() -> None:
    assert {room_of(module) for module in FILES} == set(ROOMS)


def test_no_file_is_long() -> None:
    lines = {str(f.relative_to(ROOT)): f.read_text().count("\n") for f in FILES.values()}
    assert not {name: n for name, n in lines.items() if n > 400}
