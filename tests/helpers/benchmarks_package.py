"""Makes ``import benchmarks`` work in tests without the repository root on the path, where a bare
``import kernels`` would find our folder.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"

if "benchmarks" not in sys.modules:
    package = types.ModuleType("benchmarks")
    package.__path__ = [str(FOLDER)]
    package.__spec__ = importlib.machinery.ModuleSpec("benchmarks", None, is_package=True)
    sys.modules["benchmarks"] = package
