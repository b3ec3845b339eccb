"""Test session setup: no bare folder names on the path, few threads, fixed seeds."""

from __future__ import annotations

import gc
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent

# `python -m pytest` puts the repository root on the path, where a bare `import kernels` would find
# our folder and mislead transformers, which looks for another project's package of that name.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

# Before transformers is imported: a test must never wait for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The processes of pytest-xdist share the cores, and so do those that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
settings.register_profile("fxmem", derandomize=True, deadline=None)
settings.load_profile("fxmem")
# Captures make many objects, and modules have a million that never die: collected less often, and
# modules never. A seventh of all time is in it otherwise.
gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root folder."""
    return ROOT


@pytest.fixture(scope="session", autouse=True)
def own_cache() -> Iterator[None]:
    """What is measured of this machine is neither read from the user's cache nor left there, and
    automatic chunks are as long on every machine. Regions are traced anew; ``FXMEM_REGIONS=on``
    takes them from the disk, and ``FXMEM_CACHE`` then names a folder for several runs.
    """
    from fxmem.measure.knee import NOMINAL

    regions = os.environ.get("FXMEM_REGIONS", "off")
    kept = os.environ.get("FXMEM_CACHE") if regions == "on" else None
    with (
        tempfile.TemporaryDirectory() as path,
        mock.patch.dict(os.environ, FXMEM_CACHE=kept or path, FXMEM_REGIONS=regions),
        mock.patch("fxmem.streaming.chunk_size.knee", lambda *_: NOMINAL["cpu"]),
    ):
        yield


@pytest.fixture(scope="session", autouse=True)
def quick_captures() -> Iterator[None]:
    """Dynamo's timing of its own guards, before which it empties the processor's caches, is off."""
    gc.freeze()
    with mock.patch("torch._dynamo.guards.profile_guard_manager", lambda *_: 0.0, create=True):
        yield
    gc.unfreeze()


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


FAST = (
    "test_layers", "test_errors", "test_cli", "_compat/", "axes/test_sizes",
    "rules/test_table_schema", "rules/test_table_location", "plan/", "rewriting/",
    "frontend/test_faults", "passes/test_add_products", "passes/test_scalar_inputs",
    "passes/test_select_log_probs", "streaming/test_packing", "streaming/test_batch_axis",
    "streaming/test_objectives", "runtime/test_partial_gradients", "roles/test_low_rank",
    "backends/test_segments", "blocks/test_order", "blocks/test_partition",
    "kernels/test_kernels.", "memory/", "report/", "prune/test_projection",
    "prune/test_estimator", "prune/test_control",
)  # fmt: skip
"""Starts of paths below tests/: a part of the default tests that touches every room."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests of slow.txt, and what ``pytest -m fast`` runs."""
    lines = (ROOT / "tests" / "slow.txt").read_text().splitlines()
    slow = {line for line in lines if not line.startswith("#")}
    files = {item.path.relative_to(ROOT / "tests").as_posix() for item in items}
    if not any("::" in given for given in config.args):
        known = {item.nodeid.removeprefix("tests/") for item in items}
        stale = {name for name in slow - known if name.partition("::")[0] in files}
        if stale:
            raise pytest.UsageError(f"slow.txt names tests that are gone: {sorted(stale)}")
    for item in items:
        name = item.path.relative_to(ROOT / "tests").as_posix()
        if item.nodeid.removeprefix("tests/") in slow:
            item.add_marker(pytest.mark.slow)
        wide = item.get_closest_marker("slow") or item.get_closest_marker("fuzz")
        if name.startswith(FAST) and not wide:
            item.add_marker(pytest.mark.fast)
