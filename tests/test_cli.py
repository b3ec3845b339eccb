"""The command line: arguments, exit codes, one-line errors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import transformers

from fxmem import cli
from fxmem.demo import models
from fxmem.demo import run as demo_run
from fxmem.errors import FetchError
from fxmem.optional import UsageError
from fxmem.planning import source


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("fxmem ")


@pytest.mark.parametrize(
    "arguments",
    [[], ["paint"], ["demo", "--lenght", "3"], ["demo", "--chunk", "many"], ["explain"]],
)
def test_bad_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: fxmem" in capsys.readouterr().err


class Asked:
    """Stands in for the demo and keeps what it was asked for."""

    def __init__(self, *statuses: str) -> None:
        self.statuses = statuses
        self.demo: demo_run.Demo | None = None

    def __call__(self, demo: demo_run.Demo) -> dict[str, Any]:
        self.demo = demo
        return {"setups": {str(i): {"status": status} for i, status in enumerate(self.statuses)}}


def test_demo_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked("ok")
    monkeypatch.setattr(demo_run, "run", asked)
    assert cli.main(["demo", "--setups", "plain,fxmem", "--chunk", "128", "--out", "there"]) == 0
    assert asked.demo == demo_run.Demo(setups=("plain", "fxmem"), chunk=128, out=Path("there"))


def test_short_demo_needs_no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked("ok")
    monkeypatch.setattr(demo_run, "run", asked)
    assert cli.main(["demo", "--short", "--length", "256"]) == 0
    assert asked.demo == demo_run.Demo(model="tiny", length=256, steps=2)


@pytest.mark.parametrize(
    ("statuses", "code"), [(("ok", "out of memory"), 0), (("ok", "failed"), 2)]
)
def test_demo_exit_code(
    statuses: tuple[str, ...], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_run, "run", Asked(*statuses))
    assert cli.main(["demo"]) == code


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--model", "tiny", "--length", "1"], "length is 1"),
        (["demo", "--setups", "magic"], "magic"),
        (["explain", "tiny", "--batch", "0"], "batch is 0"),
        (["explain", "no/such/folder/here"], "there is no folder 'no/such/folder/here'"),
        (["explain", "./none"], "there is no folder './none'"),
        (["explain", str(Path(__file__).parent)], "has no config.json"),
        (["explain", "someone/no-such-model"], "the hub cannot be reached"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("fxmem: ")
    assert words in error


def test_several_lines_become_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(demo: object) -> None:
        raise FetchError("first line\nsecond line")

    monkeypatch.setattr(demo_run, "run", fail)
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err.startswith("fxmem: first line second line")


def test_a_chunk_that_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["explain", "tiny", "--chunk", "abc"])
    assert "argument --chunk: 'abc' is neither auto nor a number" in capsys.readouterr().err


def test_another_kind_of_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers.T5Config().save_pretrained(tmp_path)
    assert cli.main(["explain", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "'t5', which is no causal language model" in error and "AutoModel" not in error


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def refuse(address: Any, timeout: float) -> None:
        asked.append(address)
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(source.urllib.request, "getproxies", dict)
    monkeypatch.setattr(source.socket, "create_connection", refuse)
    with pytest.raises(UsageError, match="the hub cannot be reached"):
        models.random_model("someone/no-such-model")
    assert len(asked) == 1


def test_explain_prints_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "tiny", "--length", "64"]) == 0
    assert capsys.readouterr().out.strip()


def test_importing_the_command_line_is_light() -> None:
    assert "matplotlib.pyplot" not in vars(sys.modules["fxmem.cli"])
