"""Broken kernels must fail their tests: single lines are changed in a copy of the package, and the
interpreted tests of that kernel are run against it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sources import ROOT
from test_kernels_interpreted import run

# name -> (file, line as it is, line as it breaks, the tests that must notice)
MUTATIONS = {
    "the causal offset is one too large": (
        "_attention_tiles.py",
        "seen = seen & (n[None, :] <= m[:, None] + offset)",
        "seen = seen & (n[None, :] <= m[:, None] + offset + 1)",
        "test_attention.py",
    ),
    "the loop over keys stops a block early": (
        "chunk_attention.py",
        "hi = tl.minimum(keys, first + BLOCK_M + offset)",
        "hi = tl.minimum(keys, first + offset)",
        "test_attention.py",
    ),
    "the running sum is not rescaled": (
        "chunk_attention.py",
        "total = total * keep + tl.sum(p, 1)",
        "total = total + tl.sum(p, 1)",
        "test_attention.py",
    ),
    "only the first head of a group reaches dK and dV": (
        "chunk_attention_backward.py",
        "for h in range(g * per_group, (g + 1) * per_group):",
        "for h in range(g * per_group, g * per_group + 1):",
        "test_attention.py",
    ),
    "dK replaces the accumulator": (
        "chunk_attention_backward.py",
        "tl.store(at, tl.load(at, mask=key_e, other=0.0) + dk, mask=key_e)",
        "tl.store(at, dk, mask=key_e)",
        "test_attention.py",
    ),
    "the window of the backward begins one row late": (
        "chunk_attention_backward.py",
        "hi = tl.minimum(rows, first + BLOCK_N - 1 + window - offset)",
        "hi = tl.minimum(rows, first + window - offset)",
        "test_attention.py",
    ),
    "scores of a wide head are those of its last part": (
        "_attention_tiles.py",
        "x = tl.dot(a, tl.trans(b), x, input_precision=PRECISION)",
        "x = tl.dot(a, tl.trans(b), input_precision=PRECISION)",
        "test_attention.py",
    ),
    "every program of a wide head makes its first part": (
        "_attention_wide.py",
        "i = (tl.program_id(2) * PART + tl.arange(0, PART))[None, :]",
        "i = tl.arange(0, PART)[None, :]",
        "test_attention.py",
    ),
    "the temperature is left out of the gradient": (
        "_nll_gradient.py",
        "    dz = dz * inverse_temperature",
        "    dz = dz * 1.0",
        "test_linear_nll.py",
    ),
    "columns outside the vocabulary count": (
        "linear_nll.py",
        "p = tl.where(inside, tl.exp(z - new[:, None]), 0.0)",
        "p = tl.exp(z - new[:, None])",
        "test_linear_nll.py",
    ),
    "random bits ignore the row": (
        "weight_grad.py",
        "random_bits(first + row * pitch + i[None, :], key)",
        "random_bits(first + row * 0 + i[None, :], key)",
        "test_updates.py",
    ),
    "the norm's gradient loses its mean term": (
        "norm.py",
        "dx = g - z * (tl.sum(g * z, 0) / D)",
        "dx = g",
        "test_elementwise.py",
    ),
}


def first_on_path(folder: Path) -> dict[str, str]:
    """Environment in which the copy is imported: before the installation, and not the checkout."""
    return {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as a wheel would lay it out, to be found before the installed one."""
    folder = tmp_path_factory.mktemp("mutated")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fxmem", folder / "fxmem", ignore=ignore)
    for name in ("kernels", "passes"):
        shutil.copytree(ROOT / name, folder / "fxmem" / name, ignore=ignore)
    code = "import fxmem.kernels.norm as m; print(m.__file__)"
    env = {**os.environ, **first_on_path(folder)}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert Path(found.stdout.strip()).is_relative_to(folder), found.stdout + found.stderr
    return folder


@pytest.mark.slow
def test_the_copy_passes_as_it_is(copy: Path, tmp_path: Path) -> None:
    passed, failed, output = run(tmp_path, **first_on_path(copy))
    assert not failed and sum(passed.values()) > 50, output


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_line_is_noticed(name: str, copy: Path, tmp_path: Path) -> None:
    file, line, broken, tests = MUTATIONS[name]
    path = copy / "fxmem" / "kernels" / file
    text = path.read_text()
    assert text.count(line) == 1, f"{line!r} is not in {file} exactly once"
    path.write_text(text.replace(line, broken))
    try:
        chosen = (str(ROOT / "tests" / "interpreted" / tests), "-x")
        passed, failed, output = run(tmp_path, *chosen, **first_on_path(copy))
    finally:
        path.write_text(text)
    assert failed, f"every test passed with {broken!r}: {output}"
