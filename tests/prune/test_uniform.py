"""Equal widths in all layers: the search's masks, and folders that transformers loads by itself."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from prune_cases import build, coupled
from torch import Tensor

import fxmem
from fxmem.errors import PlanError
from fxmem.prune.search.space import Space
from fxmem.prune.shrink.stock import stock_config
from fxmem.prune.units.settings import GateSettings
from fxmem.prune.units.units import UnitGroup

IDS = torch.arange(2 * 9).view(2, 9) + 3


def group(layer: int, kind: str, size: int, cost: int) -> UnitGroup:
    return UnitGroup(f"{layer}.{kind}", kind, layer, size, cost, (), (), (1,))


GROUPS = [
    group(i, *rest) for i in range(3) for rest in (("kv_groups", 4, 30), ("mlp_channels", 24, 3))
]


@given(keep=st.floats(0.05, 1), round_to=st.sampled_from([1, 4, 8]), seed=st.integers(0, 9))
def test_layers_keep_as_many_units_within_the_budget(keep: float, round_to: int, seed: int) -> None:
    options = GateSettings(keep=keep, round_to=round_to, uniform=True)
    space = Space.build(GROUPS, options, {})
    scores = torch.randn(len(space.cost), generator=torch.Generator().manual_seed(seed)).double()
    kept = space.bools(space.final(scores, options))
    spent = sum(int(kept[g.name].sum()) * g.cost for g in GROUPS)
    whole = sum(g.size * g.cost for g in GROUPS)
    assert spent <= keep * whole + 1e-9
    assert spent > keep * whole - 3 * 30 - 3 * 3 * round_to  # no more whole rows fit
    counts: dict[str, set[int]] = {}
    for g in GROUPS:
        own = scores[space.unit[space.groups.index(g)]]
        mask = kept[g.name]
        counts.setdefault(g.kind, set()).add(int(mask.sum()))
        if bool(mask.any()) and not bool(mask.all()):
            assert own[mask].min() >= own[~mask].max(), "not the best of its layer"
    assert all(len(found) == 1 for found in counts.values())
    assert all(n % round_to == 0 for n in counts["mlp_channels"])


def test_uniform_blocks_make_no_sense() -> None:
    with pytest.raises(PlanError, match="whole blocks"):
        Space.build(GROUPS, GateSettings(kinds=("layers",), uniform=True), {})
    with pytest.raises(PlanError, match="uniform"):
        fxmem.Prune(uniform="yes")  # type: ignore[arg-type]


def half(model: Any, units: fxmem.Coupling, kinds: tuple[str, ...], odd: int = 0) -> Any:
    """Every second unit; `odd` more in the first layer."""
    kept = {
        g.name: tuple(range(1, g.size, 2)) + (tuple(range(0, 2 * odd, 2)) if g.layer == 0 else ())
        for g in units.groups
        if g.kind in kinds
    }
    kept = {name: tuple(sorted(units)) for name, units in kept.items()}
    return fxmem.materialize(model, fxmem.Masks.from_kept(units, kept), units)


BOTH = ("kv_groups", "mlp_channels")


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llama", BOTH), ("llama_mha_tied", BOTH), ("llama", ("width",)),
        ("qwen2", BOTH), ("qwen3", BOTH), ("gemma2", BOTH), ("phi3", BOTH),
        ("opt", ("mlp_channels",)), ("gpt2", ("mlp_channels",)),
        ("mixtral", ("mlp_channels",)), ("mixtral", ("experts",)), ("qwen3_moe", BOTH),
    ],
)  # fmt: skip
def test_transformers_loads_equal_widths(name: str, kinds: tuple[str, ...], tmp_path: Path) -> None:
    attention = "eager" if name == "gemma2" else "sdpa"
    model = build(name, attention)
    small = half(model, coupled(name, attention), kinds)
    with torch.no_grad():
        want = small(input_ids=IDS).logits
        small.save_pretrained(tmp_path)  # as a Trainer does
        stock, report = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.float64, output_loading_info=True, experts_implementation="eager"
        )
        assert type(stock) is type(model) and not any(report.values()), report
        # gemma2's scale of embeddings is in float32 here, and in float64 as transformers loads it
        limit = 1e-5 if name == "gemma2" else 1e-10
        assert (stock.eval()(input_ids=IDS).logits - want).abs().max() < limit
        again: Any = fxmem.from_pretrained(tmp_path)
        assert torch.equal(again(input_ids=IDS).logits, want)
        again.save_pretrained(tmp_path)
        assert torch.equal(fxmem.from_pretrained(tmp_path)(input_ids=IDS).logits, want)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        type(model).__name__
    ]


def test_other_widths_are_refused_by_name_and_read_by_fxmem(tmp_path: Path) -> None:
    small = half(build("llama"), coupled("llama"), BOTH, odd=1)
    values = {n: p + 1 for n, p in small.state_dict().items()}
    copied = copy.deepcopy(small)  # copies know how they were made
    copied.save_pretrained(tmp_path, state_dict=values)
    again = fxmem.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[n], p) for n, p in values.items())
    with pytest.raises(ValueError, match="fxmem-pruned-llama"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(PlanError, match="pushed"):
        small.save_pretrained(tmp_path, push_to_hub=True)
    small.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()


class Layered(transformers.LlamaForCausalLM):
    """A class that reads its layers' sizes from ``per_layer_config``."""

    def __init__(self, config: Any) -> None:
        layers = list(config.per_layer_config)
        whole = copy.deepcopy(config)
        whole.per_layer_config = None
        super().__init__(whole)
        if config.is_heterogeneous:
            made = type(self.model.layers[0])
            self.model.layers = torch.nn.ModuleList(made(c, i) for i, c in enumerate(layers))
            self.config = config


def test_a_class_that_has_sizes_by_layer_gets_them() -> None:
    plain: Any = build("llama")
    model = Layered(plain.config).double().eval()
    model.load_state_dict(plain.state_dict())
    units = fxmem.coupling(model)
    small = half(model, units, ("mlp_channels",), odd=1)
    made = stock_config(small, units, fxmem.prune.shrink.made.origin(small)[1])  # type: ignore[index]
    assert made is not None
    assert [c.intermediate_size for c in made.per_layer_config] == [37, 36]


def test_a_trained_smaller_model_resumes_from_a_checkpoint(tmp_path: Path) -> None:
    model = build("llama").float()
    small = half(model, fxmem.coupling(model), BOTH, odd=1)
    rows: list[dict[str, Tensor]] = [{"input_ids": x, "labels": x} for x in IDS.repeat(4, 1)]

    def trainer(steps: int) -> transformers.Trainer:
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=2, report_to=[], use_cpu=True,
            disable_tqdm=True, lr_scheduler_type="constant", per_device_train_batch_size=2,
            logging_strategy="no",
        )  # fmt: skip
        return transformers.Trainer(copy.deepcopy(small), arguments, train_dataset=rows)  # type: ignore[arg-type]

    trainer(2).train()
    saved = fxmem.from_pretrained(tmp_path / "checkpoint-2")
    more = trainer(3)
    more.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert more.state.global_step == 3
    moved = dict(more.model.named_parameters())
    far = max(float((moved[n] - p).detach().abs().max()) for n, p in saved.named_parameters())
    assert 0 < far < 1e-3, "not from where it was"
