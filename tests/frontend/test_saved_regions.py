"""Regions that another process traced: from the disk, equal to traced ones, or not used."""

from __future__ import annotations

import copy
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import torch
from close import assert_near
from double import everything_in_double
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

import fxmem
from fxmem import Plan, Stream, api
from fxmem.compiler import region_codes
from fxmem.frontend import graph_bytes, saved_regions
from fxmem.runtime.code_library import CodeLibrary
from fxmem.runtime.counters import COUNTER
from fxmem.runtime.retention import Kept
from fxmem.streaming import token_mixing


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder that is read and written."""
    monkeypatch.setenv("FXMEM_CACHE", str(tmp_path))
    monkeypatch.setenv("FXMEM_REGIONS", "on")
    for module in (region_codes, token_mixing):  # other tests may have added rows
        monkeypatch.setattr(module, "revision", lambda: 0)
    with everything_in_double():
        yield tmp_path / "regions"


@pytest.fixture
def another_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Forgets what this process knows of regions, as a new one would."""

    def forget() -> None:
        region_codes._CODES.save()
        monkeypatch.setattr(region_codes, "_CODES", CodeLibrary())
        token_mixing._MIXING.clear()

    return forget


def train(model: nn.Module, length: int, masked: bool = False) -> list[torch.Tensor]:
    """Gradients of all parameters; two sequences."""
    ids = torch.randint(tiny.VOCAB, (2, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    model.zero_grad()
    model(input_ids=ids, labels=ids, **({"attention_mask": mask} if masked else {})).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def streamed(model: nn.Module) -> nn.Module:
    return fxmem.transform(copy.deepcopy(model), Plan(stream=Stream(chunk=7)))


def assert_exact(model: nn.Module, plain: nn.Module, *lengths: int, masked: bool = False) -> None:
    for length in lengths:
        for got, want in zip(
            train(model, length, masked), train(plain, length, masked), strict=True
        ):
            assert_near(got, want, torch.float64)


def made() -> tuple[int, int]:
    return COUNTER.traces, COUNTER.programs


@pytest.mark.parametrize(
    ("name", "masked"), [("llama", False), ("gemma2", True), ("gpt2", True), ("qwen3_moe", False)]
)
def test_nothing_is_traced_or_scheduled_again(
    name: str, masked: bool, folder: Path, another_process: Callable[[], None]
) -> None:
    plain = tiny.model(name).double()
    another_process()
    assert_exact(streamed(plain), plain, 17, masked=masked)
    before = [str(p) for c in region_codes._CODES for p in c.programs.values()]
    another_process()
    start = made()
    assert_exact(streamed(plain), plain, 17, 24, masked=masked)
    assert made() == start
    assert [str(p) for c in region_codes._CODES for p in c.programs.values()] == before


def test_another_capture_takes_them(folder: Path, another_process: Callable[[], None]) -> None:
    """Dynamo names sizes by where they come from: labels, or ids alone."""
    plain = tiny.model().double()
    another_process()
    assert_exact(streamed(plain), plain, 17)
    another_process()
    ids = torch.randint(tiny.VOCAB, (2, 19))
    start = COUNTER.traces
    found = []
    for model in (plain, streamed(plain)):
        model.zero_grad()
        logits = model(input_ids=ids, use_cache=False).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
        found.append([p.grad for p in model.parameters()])
    assert COUNTER.traces - start == 1  # of the head and the loss
    for want, got in zip(*found, strict=True):
        assert_near(got, want, torch.float64)


def test_a_program_that_comes_later_is_there_too(
    folder: Path, another_process: Callable[[], None]
) -> None:
    plain = tiny.model().double()
    another_process()
    assert_exact(streamed(plain), plain, 17)
    another_process()
    frozen, again = streamed(plain), copy.deepcopy(plain)
    for model in (frozen, again):
        model.model.layers[0].requires_grad_(False)
    assert_exact(frozen, again, 17)
    another_process()
    start = made()
    assert_exact(streamed(again), again, 17)
    assert made() == start


def kept(level: int) -> Callable[[nn.Module], None]:
    """Layers keep what this level keeps, as a budget may let them."""

    def use(model: nn.Module) -> None:
        train(model, 17)
        (graph,) = api._TRANSFORMED[model].graphs
        levels = tuple(min(level, len(c.code.levels) - 1) for c in graph.calls)
        object.__setattr__(graph.holding, "to_run", lambda *_: Kept(levels, frozenset()))

    return use


def frozen(model: nn.Module) -> None:
    model.model.layers[0].requires_grad_(False)


def evaluated(model: nn.Module) -> None:
    with torch.no_grad():
        model(input_ids=torch.arange(34).view(2, 17) % tiny.VOCAB)


USES = {
    "plain": lambda model: None, "level 2": kept(2), "level 3": kept(3), "frozen": frozen,
    "evaluated": evaluated,
}  # fmt: skip


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(s, marks=pytest.mark.slow) for s in range(2, 12))]
)
def test_processes_take_and_add_in_any_order(
    seed: int, folder: Path, another_process: Callable[[], None]
) -> None:
    """What a process read and wrote again is all there for the next one."""
    plain = tiny.model().double()
    another_process()
    start = made()
    for name in random.Random(seed).choices([*USES], k=5):
        model, want = streamed(plain), copy.deepcopy(plain)
        for one in (model, want):
            if name in ("frozen", "evaluated") or one is model:
                USES[name](one)
        assert_exact(model, want, 17, 24)
        another_process()
    assert made() > start


@pytest.mark.parametrize(
    "damage", [b"no pickle", "half", pickle.dumps({"a": 1})], ids=["text", "half", "foreign"]
)
def test_a_damaged_file_is_made_again(
    damage: bytes | str, folder: Path, another_process: Callable[[], None]
) -> None:
    plain = tiny.model().double()
    another_process()
    assert_exact(streamed(plain), plain, 17)
    another_process()
    whole = {file: file.read_bytes() for file in folder.iterdir()}
    for file, data in whole.items():
        file.write_bytes(data[: len(data) // 2] if isinstance(damage, str) else damage)
    start = made()
    assert_exact(streamed(plain), plain, 17)
    another_process()
    assert made() > start
    start = made()
    assert_exact(streamed(plain), plain, 17)
    assert made() == start and {*folder.iterdir()} == {*whole}


def test_a_folder_that_cannot_be_written_costs_nothing(
    tmp_path: Path,
    folder: Path,
    another_process: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FXMEM_CACHE", str(tmp_path / "file"))
    plain = tiny.model().double()
    another_process()
    assert_exact(streamed(plain), plain, 17)
    another_process()


@torch.library.custom_op("fxmem_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@twice.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Doubles(nn.Module):
    """A layer that calls an operator of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(tiny.VOCAB, 16), nn.Linear(16, tiny.VOCAB)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> CausalLMOutput:
        hidden = self.table(input_ids)
        with torch.no_grad():
            scale = twice(hidden)
        logits = self.head(hidden * scale)
        return CausalLMOutput(
            loss=nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        )


def test_an_operator_of_the_user_stays_in_its_process(
    folder: Path, another_process: Callable[[], None]
) -> None:
    plain = Doubles().double()
    another_process()
    assert_exact(streamed(plain), plain, 17)
    another_process()
    found = [graph_bytes.loads(f.read_bytes()) for f in folder.iterdir()] if folder.exists() else []
    assert not any(
        "fxmem_tests" in str(p)
        for f in found
        if not isinstance(f, bool)
        for p in f.programs.values()
    )


@pytest.mark.parametrize("change", ["version", "switch", "fuel", "off", "rows"])
def test_what_a_region_depends_on_names_its_file(
    change: str, folder: Path, another_process: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny.model().double()
    another_process()
    assert_exact(streamed(plain), plain, 17)
    another_process()
    if change == "version":
        monkeypatch.setattr(saved_regions, "_versions", lambda: "another")
    elif change == "switch":
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    elif change == "fuel":
        monkeypatch.setenv("FXMEM_VERIFY", "full")
    elif change == "off":
        monkeypatch.setenv("FXMEM_REGIONS", "off")
    else:
        monkeypatch.setattr(region_codes, "revision", lambda: 1)
        monkeypatch.setattr(token_mixing, "revision", lambda: 1)
    start = made()
    assert_exact(streamed(plain), plain, 17)
    assert made() > start


def test_few_files_stay(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_regions, "_MOST", 3)
    for i in range(5):
        saved_regions.write(folder / f"{i}", i)
        os.utime(folder / f"{i}", (i, i))
    assert {f.name for f in folder.iterdir()} == {"2", "3", "4"}


SCRIPT = """
import torch, fxmem, tiny
from fxmem.runtime.counters import COUNTER
model = fxmem.transform(tiny.model().double(), fxmem.Plan(stream=fxmem.Stream(chunk=7)))
ids = torch.arange(34).view(2, 17)
model(input_ids=ids, labels=ids).loss.backward()
print(COUNTER.traces, COUNTER.programs, float(sum(p.grad.sum() for p in model.parameters())))
"""


def test_a_second_process(folder: Path, root: Path) -> None:
    path = os.pathsep.join([str(root / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")])
    first, second = (
        subprocess.run(
            [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONPATH": path},
        ).stdout.split()
        for _ in range(2)
    )  # fmt: skip
    assert int(first[0]) > 0 and second == ["0", "0", first[2]]
