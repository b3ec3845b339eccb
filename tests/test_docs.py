"""The documents: size and example of the README, the guide to rows, notebooks without results."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sources import ROOT, repository_files

PAGES = sorted(file for file in repository_files() if file.suffix == ".md")
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
README_LINES = 150


def blocks(page: Path) -> list[str]:
    """The Python in a page."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def run(code: str, folder: Path) -> str:
    """What the code prints, run from a clean process in an empty folder."""
    file = folder / "code.py"
    file.write_text(code)
    done = subprocess.run([sys.executable, "-P", file], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def test_example_of_the_readme_learns(tmp_path: Path) -> None:
    (example,) = blocks(ROOT / "README.md")
    asked = "print(all(p.grad is not None for p in model.parameters()), fxmem.explain(model).loops)"
    every, loops = run(f"{example}\n{asked}", tmp_path).split(maxsplit=1)
    assert every == "True"
    assert "LoopReport" in loops, "nothing was streamed"


def test_guide_to_rows_runs_as_it_stands(tmp_path: Path) -> None:
    code = "\n".join(blocks(ROOT / "docs" / "adding-a-row.md"))
    tests = re.findall(r"^def (test_\w+)", code, re.MULTILINE)
    assert len(tests) == 3
    # After the last row of the page too: it says the same without letters.
    print_them = "\n".join(f"{name}(), print({name!r})" for name in tests)
    assert run(f"{code}\n{print_them}", tmp_path).split() == tests


@pytest.mark.field
def test_guide_to_trainers_runs_as_it_stands(tmp_path: Path) -> None:
    code = "\n".join(blocks(ROOT / "docs" / "guides" / "trainers.md"))
    assert code.count("\nstreamed(") == 6
    assert "done" in run(f"{code}\nprint('done')", tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_in_pages_parses(page: Path) -> None:
    for code in blocks(page):
        ast.parse(code)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    made = {book.with_suffix(".md") for book in NOTEBOOKS}
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        target = (page.parent / link).resolve()
        assert link.startswith("https://") or target.exists() or target in made, link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_pages_name_exist(page: Path) -> None:
    """By the end of their path: a page names files as its reader looks for them."""
    names = {str(file.relative_to(ROOT)) for file in repository_files()}
    for name in re.findall(r"`([\w/]+\.py)`", page.read_text()):
        assert any(f"/{file}".endswith(f"/{name}") for file in names), name


def test_there_are_notebooks() -> None:
    assert {book.stem for book in NOTEBOOKS} >= {"streaming", "blocks", "pruning", "gallery"}


@pytest.mark.parametrize("book", NOTEBOOKS, ids=lambda book: book.stem)
def test_notebooks_hold_no_results(book: Path) -> None:
    for cell in json.loads(book.read_text())["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
