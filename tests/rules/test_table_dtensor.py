"""Oracle 4: torch's sharding rules for distributed tensors against our rows.

A tensor cut along the sequence is a shard in time. For every sample call and every letter that a
row lets us cut, DTensor is asked what it makes of operands that are sharded along that letter:
without communication it must keep the shard on the axis of the output that has the letter, or give
a partial sum where none has. Two ranks of torch's "fake" process group, which moves no data.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from table_samples import IDS, SAMPLES, Sample, map_tensors
from torch import Tensor

from fxmem.axes.signature import Cut, Dims, Signature, place
from fxmem.axes.sizes import size

dist = pytest.importorskip("torch.distributed")
if not dist.is_available():
    pytest.skip("torch is built without torch.distributed", allow_module_level=True)

from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard  # noqa: E402

# Where DTensor is wrong or gathers without need; oracle 3 shows our row to be right. Key: op,
# letter.
DIFFERENT = {
    ("aten.diagonal.default", "d0"): "DTensor gathers",
    ("aten.diagonal_backward.default", "d0"): "DTensor gathers",
    ("aten.diag_embed.default", "d0"): "DTensor gathers",
    ("aten.logsumexp.default", "d1"): "DTensor counts output axes as if keepdim were false",
}

DIFFERENT |= {
    (f"aten.{op}.default", letter): "DTensor gathers"
    for op in (
        "native_batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm_backward",
    )
    for letter in ("n", "l0", "l1")
}  # fmt: skip

# DTensor's convolution, for images in parallel, splits the batch and the last axis alone.
UNKNOWN = {("aten.convolution.default", x) for x in "co"}
UNKNOWN |= {("aten.convolution_backward.default", x) for x in "co"}

asked: list[str] = []
checked: list[str] = []


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    try:
        dist.init_process_group("fake", rank=0, world_size=2)
    except (ValueError, RuntimeError) as error:
        pytest.skip(f"torch has no process group 'fake' any more: {error}")
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def cut(letter: str, dims: Dims, shape: Any, sig: Signature) -> int | None:
    """The dimension to shard; raises where DTensor cannot say it (inner letters, odd lengths)."""
    at = place(letter, Cut(-1, size(2)), dims, sig.extent)
    if at is None:
        return None
    before = dims[at.dim].index(letter)
    if before or shape[at.dim] % 2 or int(sig.extent.get(letter, 2)) % 2:
        raise ValueError(letter)
    return at.dim


def questions() -> list[tuple[str, Sample, str]]:
    out = []
    for name, sample in zip(IDS, SAMPLES, strict=True):
        if sample.op.startswith("fxmem."):
            continue
        sig = sample.signature
        operand_letters = dict.fromkeys(x for dims in sig.ins for d in dims for x in d)
        for letter in operand_letters:
            known = (sample.op, letter) not in UNKNOWN
            if letter not in sig.whole and letter not in sig.shift and known:
                out.append((name, sample, letter))
    return out


QUESTIONS = questions()


@pytest.mark.parametrize(
    ("name", "sample", "letter"), QUESTIONS, ids=[f"{n}-{x}" for n, _, x in QUESTIONS]
)
def test_dtensor_agrees(mesh: Any, name: str, sample: Sample, letter: str) -> None:
    asked.append(name)
    call, sig = sample.call, sample.signature
    try:
        dims = [cut(letter, d, t.shape, sig) for d, t in zip(sig.ins, call.tensors, strict=True)]
        outs = [
            None if d is None or o is None else (cut(letter, d, o.shape, sig),)
            for d, o in zip(sig.outs, call.outs, strict=True)
        ]
    except ValueError:
        pytest.skip("this letter is not the leading part of its dimension, or odd")
    pending = iter(dims)

    def shard(x: Tensor) -> Any:
        dim = next(pending)
        local = x if dim is None else x.narrow(dim, 0, x.shape[dim] // 2).contiguous()
        placement = Replicate() if dim is None else Shard(dim)
        return DTensor.from_local(local, mesh, [placement], run_check=False)

    try:
        result = sample.target(*map_tensors(sample.args, shard), **sample.kwargs)
    except NotImplementedError:
        pytest.skip("DTensor has no rule for this op")
    result = result if isinstance(result, (tuple, list)) else (result,)
    for got, want in zip(result, outs, strict=True):
        if want is None:
            continue
        (placement,) = got.placements
        agrees = isinstance(placement, Partial) if want[0] is None else placement == Shard(want[0])
        assert agrees == ((sample.op, letter) not in DIFFERENT), f"{placement}, our row: {want[0]}"
    checked.append(name)


def test_most_samples_were_compared() -> None:
    assert len(checked) >= 0.8 * len(asked), f"{len(checked)} of {len(asked)}"
