"""What was found out about a region, on the disk for the next process.

A file's name is the digest of all that its content depends on: the region, where its lines stand
(reports name them), the versions, fxmem's own text and torch's switches. So a file is right or not
found, and nothing is ever invalidated. Regions that call what another process may have changed
under its name (the user's own operators and functions), or a constant of the model, have no file.

The folder is ``regions`` in :func:`fxmem.files.cache_folder`. ``FXMEM_REGIONS=off`` in the
environment: neither read nor written.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import pickle
import platform
import uuid
from pathlib import Path
from typing import Any

import torch

from fxmem.files import cache_folder
from fxmem.frontend.graph_bytes import dumps, loads
from fxmem.frontend.origin import module_path, source_line
from fxmem.frontend.regions import HERE, Region

SWITCH = "FXMEM_REGIONS"
_WATCHING = ("FXMEM_FUEL", "FXMEM_VERIFY", "FXMEM_DUMP", "FXMEM_DIFF")
"""Switches under which every pass is to run."""
_MOST = 2048
"""Files that stay; those that were not read for the longest time go first."""


def file_of(region: Region, key: str) -> Path | None:
    """Where what ``key`` names about a region is, or is to be; None for nowhere."""
    if os.environ.get(SWITCH) == "off" or any(os.environ.get(name) for name in _WATCHING):
        return None
    text = region.described()
    if HERE in text or any(_has_constants(cone) for _, cone in region.cones):
        return None
    places = [f"{source_line(n)} {module_path(n)}" for n in region.nodes]
    devices = sorted({str(v.device) for v in region.values if v.device.type != "cpu"})
    names = [torch.get_device_module(d).get_device_name(d) for d in devices]
    parts = [key, text, str(region.capture.assumed), *places, *names, *_switches(), _versions()]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return cache_folder() / "regions" / digest


def read(file: Path) -> Any:
    """What :func:`write` was given; None where there is nothing whole."""
    try:
        if hasattr(os, "getuid") and file.stat().st_uid != os.getuid():
            return None  # it could run anything
        found = loads(file.read_bytes())
        file.touch()
    except Exception:  # a damaged file may raise anything
        return None
    return found


def write(file: Path, value: Any) -> None:
    """What cannot be written, or made again elsewhere, is only found out once more."""
    part = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    with contextlib.suppress(OSError, pickle.PicklingError):
        data = dumps(value)
        file.parent.mkdir(parents=True, exist_ok=True)
        try:  # nothing is lost with it, so it need not be on the disk before it has its name
            part.write_bytes(data)
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)
        _tidy(file.parent)


def _tidy(path: Path) -> None:
    files = [f for f in path.iterdir() if not f.name.startswith(".")]
    if len(files) > _MOST:
        for file in sorted(files, key=lambda f: f.stat().st_mtime)[: len(files) - _MOST]:
            file.unlink(missing_ok=True)


def _has_constants(cone: Any) -> bool:
    module = getattr(cone, "module", None)  # of tensors that are made of others there is none
    return module is None or any(n.op == "get_attr" for n in module.graph.nodes)


def _switches() -> list[str]:
    """Of torch, which a trace obeys."""
    return [
        str(torch.get_default_dtype()), str(torch.get_default_device()),
        str(torch.are_deterministic_algorithms_enabled()), torch.get_float32_matmul_precision(),
        str(torch.backends.mkldnn.enabled), torch.backends.cpu.get_cpu_capability(),
    ]  # fmt: skip


@functools.cache
def _versions() -> str:
    """Of Python, torch and fxmem, whose own text counts: a working copy changes under a version."""
    digest = hashlib.sha256()
    for name in ("fxmem", "fxmem.passes", "fxmem.kernels"):
        spec = importlib.util.find_spec(name)
        folders = (spec and spec.submodule_search_locations) or []
        for file in sorted(f for path in folders for f in Path(path).rglob("*.py")):
            digest.update(file.read_bytes())
    here = f"{platform.python_implementation()} {platform.python_version()} {platform.machine()}"
    return f"{here} torch {torch.__version__} {digest.hexdigest()}"


__all__ = ["file_of", "read", "write"]
