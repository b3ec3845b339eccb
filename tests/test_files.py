"""Files: written whole or not at all; damaged, foreign and unwritable ones are named errors."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prune_cases import build
from test_session import by_hooks, llama, units

import fxmem
from fxmem import FileError, FxmemError, MaskError, Masks, Plan, PlanError, Stream, cli, files
from fxmem.prune.search.session import run
from fxmem.prune.units.settings import ScoreSettings

OLD = "the old text"


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_is_replaced_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    files.write_text(file, OLD)
    with pytest.raises(KeyboardInterrupt), files.replacing(file) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    for fault in (OSError("gone"), RuntimeError("PytorchStreamWriter failed")):
        with pytest.raises(FileError) as caught, files.replacing(file) as part:
            part.write_text("half")
            raise fault
        assert caught.value.__cause__ is fault
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(FileError, match="No space left"):
            files.write_text(file, "new")
    assert file.read_text() == OLD
    assert left(tmp_path) == ["a.json"]
    files.write_text(file, "new")
    assert file.read_text() == "new"
    assert file.stat().st_mode & 0o777 == 0o666 & ~files._umask()


def test_targets_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text(OLD)
    for target in (tmp_path / "folder", tmp_path / "none" / "a", tmp_path / "file" / "a"):
        with pytest.raises(FileError):
            files.write_text(target, "new")
        with pytest.raises(FileError):
            files.check_target(target)
    for wrong in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(FileError):
            files.folder(wrong)
    assert (tmp_path / "file").read_text() == OLD
    assert left(tmp_path) == ["file", "folder"]
    assert left(files.folder(tmp_path / "new" / "one")) == []


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved smaller model."""
    folder: Path = tmp_path_factory.mktemp("small")
    fxmem.save_pretrained(build("llama"), folder)
    fxmem.from_pretrained(folder)
    return folder


NAMES = ("pruning.json", "config.json", "model.safetensors")
DAMAGE: dict[str, Any] = {
    "missing": lambda f: f.unlink(),
    "empty": lambda f: f.write_bytes(b""),
    "half": lambda f: f.write_bytes(f.read_bytes()[: f.stat().st_size // 2]),
    "last byte": lambda f: f.write_bytes(f.read_bytes()[:-1]),
    "garbage": lambda f: f.write_bytes(b"\x00\xff\xfe garbage" * 40),
    "list": lambda f: f.write_text("[1, 2]"),
    "deep": lambda f: f.write_text("[" * 100_000),
    "folder": lambda f: (f.unlink(), f.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", NAMES)
def test_damaged_smaller_models(small: Path, tmp_path: Path, name: str, damage: str) -> None:
    folder = shutil.copytree(small, tmp_path / "copy")
    DAMAGE[damage](folder / name)
    with pytest.raises(fxmem.PruningFileError, match=str(folder)):
        fxmem.from_pretrained(folder)


def test_other_smaller_models_files(small: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "none", small / "config.json"):
        with pytest.raises(fxmem.PruningFileError):
            fxmem.from_pretrained(folder)
    other = tmp_path / "other"
    fxmem.save_pretrained(build("llama"), other)
    mixed = shutil.copytree(small, tmp_path / "mixed")
    shutil.copy(other / "model.safetensors", mixed)
    with pytest.raises(fxmem.PruningFileError, match="different saves"):
        fxmem.from_pretrained(mixed)


def test_a_model_is_saved_over_another_or_not(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(small, tmp_path / "copy")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(FileError, match="No space left"):
            fxmem.save_pretrained(build("llama"), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    with pytest.raises(FileError):
        fxmem.save_pretrained(build("llama"), folder / "config.json")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([10**30, 0.5, float("inf")])
    | st.sampled_from(["", "x", "1", "auto"]),
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(st.sampled_from(["a", "chunk", "groups"]), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip


def places(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    return [at, *(p for k in keys for p in places(data[k], (*at, k)))]


def changed(draw: st.DataObject, data: Any) -> Any:
    """The data with one value, at any depth, replaced or missing."""
    at = draw.draw(st.sampled_from(places(data)))
    value = draw.draw(VALUES)
    if not at:
        return value
    *before, last = at
    owner = data
    for key in before:
        owner = owner[key]
    if draw.draw(st.booleans()):
        owner[last] = value
    else:
        del owner[last]
    return data


def any_change_of_a_smaller_models_file(
    small: Path, tmp_path_factory: pytest.TempPathFactory, draw: st.DataObject
) -> None:
    folder = shutil.copytree(small, tmp_path_factory.mktemp("any") / "copy")
    name = draw.draw(st.sampled_from(["pruning.json", "config.json"]))
    data = changed(draw, json.loads((folder / name).read_text()))
    (folder / name).write_text(json.dumps(data))
    try:
        fxmem.from_pretrained(folder)
    except FxmemError as error:
        assert str(folder) in str(error)


@pytest.mark.parametrize("examples", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_any_change_of_a_smaller_models_file_loads_or_is_named(
    small: Path, tmp_path_factory: pytest.TempPathFactory, examples: int
) -> None:
    given(st.data())(
        settings(max_examples=examples)(
            lambda draw: any_change_of_a_smaller_models_file(small, tmp_path_factory, draw)
        )
    )()


PLAN = Plan(
    stream=Stream(chunk=4), blocks=fxmem.Blocks(inactive=fxmem.SGD(0.1), partition=(("a",), ("b",)))
)  # fmt: skip


@given(st.data())
@settings(max_examples=300)
def test_any_change_of_a_plan_or_masks_reads_or_is_named(draw: st.DataObject) -> None:
    masks = Masks("m", (("g", 3, (0, 2)),))
    for cls, value, error in ((Plan, PLAN, (PlanError, MaskError)), (Masks, masks, (MaskError,))):
        data = changed(draw, json.loads(value.to_json()))
        with contextlib.suppress(*error):
            cls.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\x00", "nonsense = [", "1", "null"])
def test_texts_that_are_no_plan_or_masks(text: str) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(text)
    with pytest.raises(MaskError):
        Masks.from_json(text)
    if text:  # an empty TOML is a plan of defaults
        with pytest.raises(PlanError):
            Plan.from_toml(text)


def batches() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(50, (2, 6))
    return [{"input_ids": ids, "labels": ids}]


def search(file: Path, channels: int = 16, scale: float = 1.0) -> None:
    net, groups = llama(channels), units(channels)
    with torch.no_grad():
        net.lm_head.weight.mul_(scale)
    options = ScoreSettings(keep=0.6, steps=2, samples=2, init="magnitude")
    run(net, groups, by_hooks(net, groups), batches(), options, checkpoint=file)


@pytest.mark.parametrize("damage", [d for d in DAMAGE if d != "missing"])
def test_damaged_search_checkpoints(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "search.pt"
    search(file)
    DAMAGE[damage](file)
    with pytest.raises(FileError, match=r"search\.pt"):
        search(file)


def test_foreign_and_unwritable_search_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "search.pt"
    for foreign in (torch.ones(3), {"model": {}}, {"of": "", "importance": {}, "loop": {}}):
        torch.save(foreign, file)
        with pytest.raises(FileError, match="delete the file"):
            search(file)
    file.unlink()
    search(file)
    saved = torch.load(file, weights_only=True)
    for key in saved["loop"]:
        torch.save(saved | {"loop": {k: v for k, v in saved["loop"].items() if k != key}}, file)
        with pytest.raises(FileError):
            search(file)
    torch.save(saved, file)
    with pytest.raises(FileError, match="on this model"):
        search(file, channels=8)
    with pytest.raises(FileError, match="on this model"):  # equal shapes, other weights
        search(file, scale=2.0)
    file.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(FileError, match="No space left"):
            search(file)
    assert left(tmp_path) == []
    with pytest.raises(FileError):
        search(tmp_path / "none" / "search.pt")


def test_the_command_line_names_what_it_cannot_read_or_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "config.json").write_text("{")
    for target in (out, text):
        arguments = ["prune", str(tmp_path), "--data", str(text), "--out", str(target)]
        assert cli.main(arguments) == 2
        assert "cannot be read" in (said := capsys.readouterr().err) or "no folder" in said
