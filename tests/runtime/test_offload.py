"""Homes of saved tensors: what comes back is what went, and faults leave nothing behind."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

import fxmem
from fxmem import Plan, Stream
from fxmem.errors import ModifiedParameterError, OffloadError
from fxmem.runtime import offload
from fxmem.runtime.offload import Disk, Leaving

ROWS = offload.SMALLEST
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool]


@pytest.fixture
def disk() -> Disk:
    return Disk()


def random(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(2, (count, 3)).to(dtype)


@given(order=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=6), twice=st.booleans())
def test_what_comes_back_is_what_went(order: list[torch.dtype], twice: bool) -> None:
    leaving = Leaving(Disk())
    kept = [[random(ROWS, d), None, random(2, d), random(ROWS, d).t()] for d in order]
    away = [leaving.save(k) for k in kept]
    for (parcel, gone), tensors in reversed(list(zip(away, kept, strict=True))):
        assert gone == {0}  # what is small, or a view, stays
        for _ in range(1 + twice):
            (back,) = parcel.get().values()
            assert torch.equal(back, tensors[0]) and back.dtype == tensors[0].dtype


def test_a_tensor_of_two_regions_goes_once(disk: Disk) -> None:
    leaving, shared = Leaving(disk), random(ROWS, torch.float32)
    first, second = leaving.save([shared])[0], leaving.save([shared])[0]
    assert disk._end == shared.nbytes
    for parcel in (second, first):
        assert torch.equal(parcel.get()[0], shared)


def test_places_are_used_again(disk: Disk) -> None:
    for _ in range(3):
        leaving = Leaving(disk)
        parcels = [leaving.save([random(ROWS, torch.float32)])[0] for _ in range(4)]
        del leaving, parcels
        gc.collect()
    assert disk._end == 4 * 3 * ROWS * 4


def test_memory_is_free_once_it_is_away(disk: Disk) -> None:
    leaving = Leaving(disk)

    def save() -> list[object]:
        return [leaving.save([torch.ones(1 << 18)])[0] for _ in range(16)]

    held: list[object] = []
    assert fxmem.measure.peak_bytes(lambda: held.extend(save())) <= 4 << 20  # of 16


def test_a_change_in_place_is_an_error(disk: Disk) -> None:
    tensor = random(ROWS, torch.float32)
    parcel, _ = Leaving(disk).save([tensor])
    tensor.zero_()
    with pytest.raises(ModifiedParameterError, match="changed in place before its backward"):
        parcel.get()


def test_a_full_disk_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    net = tiny.model(num_hidden_layers=3, hidden_size=64, max_position_embeddings=4096)
    inputs = tiny.batch(1, 1024)
    _, want = tiny.step(net, inputs)
    fxmem.transform(net, Plan(stream=Stream(chunk=64, loss_chunk=64, offload="disk")))
    offload.home.cache_clear()
    calls, reserve = [], os.posix_fallocate

    def full(fd: int, at: int, size: int) -> None:
        calls.append(at)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        reserve(fd, at, size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = {n: p.clone() for n, p in net.named_parameters()}
    net.zero_grad()
    with pytest.raises(OffloadError, match=r"the disk has no room for .*TMPDIR"):
        net(**inputs)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in net.named_parameters())
    _, got = tiny.step(net, inputs)
    assert all(torch.allclose(got[n], want[n], rtol=1e-4, atol=1e-6) for n in want)


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(OffloadError, match="no temporary file can be made"):
        Disk()


def test_a_killed_process_leaves_no_file(tmp_path: Path) -> None:
    code = """
        import os, signal, torch
        from fxmem.runtime.offload import Disk, Leaving
        parcel = Leaving(Disk()).save([torch.ones(1 << 20)])[0]
        parcel.get()
        os.kill(os.getpid(), signal.SIGKILL)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env={**os.environ, "TMPDIR": str(tmp_path)},
        check=False,
    )  # fmt: skip
    assert run.returncode == -9
    assert not list(tmp_path.iterdir())
