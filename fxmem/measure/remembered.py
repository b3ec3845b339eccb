"""Numbers measured once on this machine, then read from the user's cache."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from fxmem.errors import FxmemError
from fxmem.files import cache_folder, folder, write_text


def remembered(
    name: str, device: torch.device, detail: str, measure: Callable[[], Sequence[float]]
) -> list[float]:
    """What ``measure`` found for ``name``, the device, PyTorch's version and ``detail``.

    An empty answer is not remembered. A cache that cannot be written to only costs the next process
    a measurement.
    """
    key = f"{name}, {_describe(device)}, torch {torch.__version__}, {detail}"
    file = cache_folder() / "measured.json"
    known = _read(file)
    if key not in known:
        known[key] = [float(v) for v in measure()]
        if not known[key]:
            return []
        with suppress(FxmemError):
            folder(file.parent)
            write_text(file, json.dumps({**_read(file), key: known[key]}, indent=1))
    return known[key]


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{platform.node()}, {torch.get_num_threads()} threads"
    return str(torch.get_device_module(device).get_device_name(device))


def _read(file: Path) -> dict[str, list[float]]:
    """What is there and well formed."""
    with suppress(OSError, ValueError):
        found = json.loads(file.read_text(encoding="utf-8"))
        return {k: v for k, v in dict(found).items() if _fine(v)}
    return {}


def _fine(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(x, float) and 0 < x < float("inf") for x in value
    )


__all__ = ["remembered"]
