"""Layers: a lower module never imports a higher one when it is itself imported.

Imports inside functions are allowed to point up; imports within a layer are allowed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from sources import ROOT, imports, package_files

# Lowest first. A name is a file or folder of fxmem/, or the root folders passes and kernels. Every
# file must be listed; put a new one as low as its imports allow.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "errors",
        "sizes",
        "runtime",
        "functional",
        "_compat",
        "_compat_measure",
        "_compat_memory",
        "_compat_inductor",
        "explain_text",
        "plan_checks",
        "plan_blocks",
    ),
    ("plan", "axes", "rules", "measure"),
    ("capture", "preamble", "dropped"),
    ("regions", "joint"),
    (
        "labels",
        "schedule",
        "held",
        "program",
        "loop_body",
        "emit",
        "overwrite",
        "keep_sum",
        "chunks",
        "packing",
        "region_code",
    ),
    ("pipeline", "verify", "passes", "kernels", "masks", "profile", "experts"),
    ("prune",),
    (
        "compile_stats",
        "symbolic",
        "segment_form",
        "segment_call",
        "inductor",
        "lowering",
        "executor",
        "blocks",
        "holding",
        "compiled",
        "memory",
        "explain",
        "api",
    ),
    ("__init__",),
    ("isolate", "trial", "demo", "cli"),
)

LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = package_files()


def module_of(file: Path) -> str:
    """The table's name for a file: its first folder or stem below fxmem/."""
    first, *rest = file.relative_to(ROOT).with_suffix("").parts
    return rest[0] if first == "fxmem" else first


def target_of(name: str) -> str | None:
    """The table's name for an imported dotted path, None where it is not ours.

    ``from fxmem import X`` needs the package itself unless X is a module.
    """
    first, *rest = name.split(".")
    if first != "fxmem":
        return None
    return rest[0] if rest and rest[0] in MODULES else "__init__"


MODULES = {module_of(file) for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_import_points_up(file: Path) -> None:
    module = module_of(file)
    assert module in LEVEL, f"fxmem/{module} is in no layer; add it to LAYERS in {__file__}"
    wrong = [
        f"line {found.line}: {module} imports {found.name}, which is in a higher layer"
        for found in imports(file)
        if found.at_import
        and (target := target_of(found.name)) is not None
        and LEVEL.get(target, 0) > LEVEL[module]
    ]
    assert not wrong, "\n".join(wrong)


def test_a_module_is_in_one_layer() -> None:
    assert len(LEVEL) == sum(map(len, LAYERS))
