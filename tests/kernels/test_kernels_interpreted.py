"""Starts the tests of ``tests/kernels/interpreted`` in a process with Triton's interpreter, and
reports them file by file.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import pytest
from sources import ROOT

FOLDER = Path(__file__).resolve().parent / "interpreted"
FILES = sorted(path.stem for path in FOLDER.glob("test_*.py"))


def run(where: Path, *chosen: str, **environment: str) -> tuple[Counter[str], list[str], str]:
    """``(passed tests by file, failed tests, output)`` of an interpreted session."""
    env = {**os.environ, "TRITON_INTERPRET": "1", **environment}
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "--tb=short", "-p", "no:cacheprovider"]
    command += [f"--junitxml={where / 'junit.xml'}", *(chosen or (str(FOLDER),))]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    passed: Counter[str] = Counter()
    failed = []
    if (where / "junit.xml").exists():
        for case in ElementTree.parse(where / "junit.xml").iter("testcase"):
            file = case.get("classname", "").split(".")[-1]
            if len(case):  # failure, error or skipped
                failed.append(f"{file}::{case.get('name')}: {case[0].get('message', '')[:300]}")
            else:
                passed[file] += 1
    return passed, failed, (done.stdout + done.stderr)[-3000:]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> tuple[Counter[str], list[str], str]:
    """One session over all files."""
    pytest.importorskip("triton", reason="no Triton for this system")
    return run(tmp_path_factory.mktemp("interpreted"))


@pytest.mark.parametrize("file", FILES)
def test_kernels_equal_their_references(
    file: str, session: tuple[Counter[str], list[str], str]
) -> None:
    passed, failed, output = session
    wrong = [name for name in failed if name.startswith(f"{file}::")]
    assert not wrong, "\n".join(wrong)
    assert passed[file] > 0, output
