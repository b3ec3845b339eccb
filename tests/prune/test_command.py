"""``fxmem prune`` and ``python -m benchmarks.prune`` on a tiny folder."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import benchmarks_package  # noqa: F401
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import fxmem
from benchmarks.prune import Options, run
from fxmem import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that reads bytes, saved with its tokenizer."""
    where = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    bytewise = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=bytewise).save_pretrained(where)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=1000, initializer_range=0.3, use_cache=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(where)
    return where


@pytest.mark.parametrize(
    "recovery",
    [[], ["--recover", "3", "--distill"]],
    ids=["as it is", "recovered"],
)
def test_prune_writes_a_smaller_model(
    recovery: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    out = tmp_path / "small"
    arguments = ["prune", str(folder), "--keep", "0.5", "--data", str(text), "--out", str(out)]
    short = ["--steps", "3", "--length", "16", "--batch", "2", "--repair"]
    assert cli.main([*arguments, *short, *recovery]) == 0
    said = capsys.readouterr().out
    assert "of the prunable parameters removed" in said
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    again = fxmem.from_pretrained(out)
    kept = sum(p.numel() for p in again.parameters())
    assert f"-> {kept:,} parameters" in said
    found = re.search(r"held-out text ([\d.]+(?: -> [\d.]+)+); [\d,]+ -> [\d,]+ tokens", said)
    assert found is not None
    figures = [float(x) for x in found[1].split(" -> ")]
    assert len(figures) == (3 if recovery else 2) and min(figures) > 1
    assert 0 < written < sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--data": "nowhere.txt"}, "no text file"),
        ({"--length": "100000"}, "one batch needs"),
        ({"--keep": "0"}, "keep"),
        ({"--length": "1"}, "at least 2"),
        ({"--recover": "-1"}, "number of steps"),
        ({"--device": "moon", "--length": "4"}, "device 'moon'"),
        ({"--kinds": "layers,feathers", "--length": "4", "--batch": "1"}, "kind 'feathers'"),
    ],
)
def test_prune_names_what_is_wrong(
    change: dict[str, str], message: str, folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    text = tmp_path / "text.txt"
    text.write_text("too short for that")
    asked = {"--data": str(text), "--out": str(tmp_path / "small"), **change}
    arguments = [word for pair in asked.items() for word in pair]
    assert cli.main(["prune", str(folder), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_benchmark_rows_on_a_tiny_model(folder: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    some = [{"uid": "u", "good": "a dog barks", "bad": f"a dog bark {i}"} for i in range(3)]
    pairs.write_text("\n".join(json.dumps(pair) for pair in some))
    options = Options(
        model=str(folder), keep=(0.5,),
        rows=("wanda", "torch-pruning", "score", "gates", "gates + repair"), second=pairs,
        steps=3, score_steps=4, samples=2, length=32, held=2, calibration=2,
        blimp=pairs, pairs=2,
        time_length=32, time_batch=1, repeats=1, peer_seconds=1, out=tmp_path / "out",
    )  # fmt: skip
    first = run(replace(options, rows=("wanda",), times="later"))
    assert [r["row"] for r in first] == ["dense", "wanda"] and "whole_ms" not in first[0]
    records: dict[str, Any] = {record["row"]: record for record in run(options)}
    assert list(records) == ["dense", *options.rows]
    mine = [row for row in records if row != "torch-pruning"]
    assert all(records[row]["status"] == "ok" and records[row]["whole_ms"] > 0 for row in mine)
    assert records["wanda"]["find_seconds"] == first[1]["find_seconds"], "measured twice"
    why = ("ok", "no result in 1 s", "torch-pruning is not installed")
    assert records["torch-pruning"]["status"] in why
    with pytest.raises(fxmem.FxmemError, match="steps"):
        run(replace(options, steps=5))
    assert (records["score"]["submodels"], records["score"]["forwards"]) == (2, 8)
    assert records["gates"]["forwards"] == 3 and records["gates"]["submodels"] <= 3
    assert records["gates + repair"]["find_seconds"] > records["gates"]["find_seconds"]
    assert all(records[row]["second"] > 0 for row in mine)
    for row in mine[1:]:
        assert records[row]["parameter_bytes"] < records["dense"]["parameter_bytes"]
        assert 0.5 <= records[row]["removed"] < 0.75
    table = (options.out / "prune.md").read_text()
    assert "**3 steps**" in table and str(tmp_path) not in table
    assert str(tmp_path) not in (options.out / "prune.json").read_text()
    assert (options.out / "prune.png").stat().st_size > 0
