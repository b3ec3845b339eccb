"""Every example runs from a clean process and holds its own assertions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
LIMIT_LINES, LIMIT_SECONDS = 80, 240


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 5


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    # -P keeps the folder of the script off the path, as an installed package would be used.
    done = subprocess.run(
        [sys.executable, "-P", str(path)],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip(), "an example that prints nothing shows nothing"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short_and_has_a_main(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < LIMIT_LINES
    assert "def main() -> None:" in text
    assert path.name in text.splitlines()[2], "the docstring says how to run it"
