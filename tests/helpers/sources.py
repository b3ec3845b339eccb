"""What the packaging and layer tests read: the repository's own files, and their imports."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Folder in the repository -> package it installs as.
FOLDERS = {"fxmem": "fxmem", "passes": "fxmem.passes", "kernels": "fxmem.kernels"}


def repository_files() -> list[Path]:
    """Files that are tracked or about to be: not ignored, and there."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(file for name in names.split("\0") if name and (file := ROOT / name).is_file())


def package_files() -> list[Path]:
    """Python files that install with the package."""
    return sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))


def package_of(folder: Path) -> str:
    """Dotted name that a folder of the repository installs as."""
    first, *rest = folder.relative_to(ROOT).parts
    return ".".join([FOLDERS[first], *rest])


def module_of(file: Path) -> str:
    """Dotted name that a file of the package is imported by."""
    package = package_of(file.parent)
    return package if file.stem == "__init__" else f"{package}.{file.stem}"


@dataclass(frozen=True, slots=True)
class Import:
    """One imported name: its dotted path, its line, whether importing the file runs it, and whether
    it ever runs.
    """

    name: str
    line: int
    at_import: bool
    typing: bool = False


def imports(file: Path) -> Iterator[Import]:
    """Every import of a file, relative ones resolved; ``from a import b`` gives ``a.b``."""
    stack: list[tuple[ast.AST, bool, bool]] = [
        (ast.parse(file.read_text(), str(file)), True, False)
    ]
    while stack:
        node, at_import, typing = stack.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            at_import, typing = False, True
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_import, typing)
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package_of(file.parent).split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [base])])
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, at_import, typing)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            at_import = False
        stack.extend((child, at_import, typing) for child in ast.iter_child_nodes(node))
