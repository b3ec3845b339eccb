"""Test session setup: no bare folder names on the path, few threads, fixed seeds."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# `python -m pytest` puts the repository root on the path, where a bare `import kernels` would find
# our folder and mislead transformers, which looks for another project's package of that name.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

# Before transformers is imported: a test must never wait for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

# The processes of pytest-xdist share the cores.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
settings.register_profile("fxmem", derandomize=True, deadline=None)
settings.load_profile("fxmem")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root folder."""
    return ROOT


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers for every test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def no_bare_names() -> Iterator[None]:
    """At the end of the session neither folder may have been imported under its bare name."""
    yield
    for name in ("passes", "kernels"):
        file = getattr(sys.modules.get(name), "__file__", None)
        assert file is None or not Path(file).is_relative_to(ROOT / name), f"bare import of {name}"
