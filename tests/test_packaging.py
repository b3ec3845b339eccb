"""Packaging: what installs, what a bare import finds, and what may not be in the repository."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from sources import FOLDERS, ROOT, imports, package_files, package_of, repository_files

MAX_LINES = 500
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


def names(files: list[Path]) -> list[str]:
    return [str(file.relative_to(ROOT)) for file in files]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy, so that no leftover of an earlier build gets in."""
    copy = tmp_path_factory.mktemp("source")
    for folder in FOLDERS:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, capture_output=True)
    (file,) = (copy / "dist").glob("*.whl")
    return zipfile.ZipFile(file)


def test_packages_are_the_folders() -> None:
    folders = {package_of(file.parent) for file in package_files()}
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(folders)
    mapped = {name: folder for folder, name in FOLDERS.items()}
    assert PROJECT["tool"]["setuptools"]["package-dir"] == mapped


def test_every_package_folder_has_an_init() -> None:
    # Without the file a package works from a wheel but not from an editable install.
    folders = {file.parent for file in package_files()}
    assert not {folder for folder in folders if not (folder / "__init__.py").exists()}


def test_wheel_holds_fxmem_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    data = PROJECT["tool"]["setuptools"]["package-data"]
    expected = {
        "/".join([*package_of(file.parent).split("."), file.name]) for file in package_files()
    } | {
        "/".join([*package.split("."), str(file.relative_to(ROOT / package.replace(".", "/")))])
        for package, patterns in data.items()
        for pattern in patterns
        for file in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    assert held == expected


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    info = next(name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name)
    points = wheel.read(f"{info}/entry_points.txt").decode()
    assert "[torch_dynamo_backends]\nfxmem = fxmem.api:fxmem_backend" in points
    assert "[console_scripts]\nfxmem = fxmem.cli:main" in points
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    assert "License-Expression: Apache-2.0" in wheel.read(f"{info}/METADATA").decode()


def test_version_is_said_once() -> None:
    import fxmem

    assert fxmem.__version__ == PROJECT["project"]["version"]
    assert importlib.metadata.version("fxmem") == PROJECT["project"]["version"]


def test_folders_are_not_importable_by_their_bare_names() -> None:
    for name in ("passes", "kernels"):
        spec = importlib.util.find_spec(name)
        origin = None if spec is None else spec.origin
        assert origin is None or not Path(origin).is_relative_to(ROOT)


def test_import_needs_no_triton_and_takes_no_bare_name(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["triton"] = None  # any import of it now fails
import fxmem, fxmem.passes, fxmem.kernels
assert not {"passes", "kernels"} & set(sys.modules)
assert not hasattr(fxmem.kernels, "__version__")
"""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)


def test_kernels_folder_survives_a_bare_import() -> None:
    # transformers looks for another project's `kernels` without a `try`; where a person's working
    # folder puts ours in its place, it must see a package without a version and go on.
    code = "import kernels, transformers.modeling_utils; assert not hasattr(kernels, '__version__')"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True)


def test_imports_are_declared() -> None:
    """Core files import the dependencies; the demo, and functions, may import its extra too."""
    project = PROJECT["project"]

    def declared(requirements: list[str]) -> set[str]:
        return {re.split(r"[\s<>=!;\[~]", line)[0].replace("-", "_") for line in requirements}

    own = set(sys.stdlib_module_names) | {"fxmem"} | declared(project["dependencies"])
    extra = own | declared(project["optional-dependencies"]["demo"])
    wrong = [
        f"{file.relative_to(ROOT)}:{found.line} imports {found.name}"
        for file in package_files()
        for found in imports(file)
        if found.name.split(".")[0]
        not in (own if found.at_import and "demo" not in file.parts else extra)
    ]
    assert not wrong, "\n".join(wrong)


def private_torch_names(file: Path) -> list[str]:
    """Names with a leading underscore that a file reaches through torch, operators aside."""
    found = [(entry.line, entry.name) for entry in imports(file)]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute):
            found.append((node.lineno, ast.unparse(node)))
    return [
        f"{file.relative_to(ROOT)}:{line} {name}"
        for line, name in sorted(found)
        if re.match(r"torch\.(?!ops\.)([\w.]+\.)?_(?!_)", name)
    ]


def test_private_torch_names_stay_in_compat() -> None:
    files = [file for file in package_files() if file.parent.name != "_compat"]
    wrong = [line for file in files for line in private_torch_names(file)]
    assert not wrong, "\n".join(wrong)


def test_private_torch_names_are_found() -> None:
    assert any(
        "torch._dynamo" in line for line in private_torch_names(ROOT / "fxmem/_compat/graph.py")
    )


def test_files_are_short() -> None:
    lengths = {
        name: len(file.read_text().splitlines())
        for file in repository_files()
        if file.suffix == ".py"
        for name in names([file])
    }
    assert not {name: length for name, length in lengths.items() if length > MAX_LINES}


# Written so that no pattern matches its own text.
FORBIDDEN = {
    "a path of somebody's machine": r"(?<![\w.~-])/(work|opt|root|home|Users)/",
    "a folder beside the repository": r"\.\.[/]shared\b|\bshared[/](design|spec|style|data|hooks)",
    "a package index": r"index[-_]url|find[-_]links|pypi[.]org|pythonhosted[.]org|"
    r"download[.]pytorch[.]org|registry[.]npmjs",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_repository_works_anywhere(what: str) -> None:
    wrong = []
    for file in repository_files():
        try:
            lines = file.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(lines, 1):
            if re.search(FORBIDDEN[what], line):
                wrong.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert not wrong, f"{what}:\n" + "\n".join(wrong)


def test_no_test_layout_that_shadows() -> None:
    # Either file makes pytest put the root on the path, and then `import kernels` finds ours.
    assert not (ROOT / "conftest.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()
    # tests/ has folders named after ours, so it may not be on the path itself
    path = PROJECT["tool"]["pytest"]["ini_options"]["pythonpath"]
    folders = {child.name for name in path for child in (ROOT / name).iterdir() if child.is_dir()}
    assert not folders & {"kernels", "passes", "triton", "fxmem"}
