"""The search on a tiny Llama, its sub-models made by masking the consumers' inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from prune_options import scored
from torch import Tensor, nn

from fxmem.errors import BudgetError, PlanError
from fxmem.prune.search.scores import METHODS, importance
from fxmem.prune.search.session import Step, run
from fxmem.prune.search.space import Space, standardise
from fxmem.prune.units.options import Prune
from fxmem.prune.units.settings import ScoreSettings


@dataclass(frozen=True)
class Unit:
    name: str
    kind: str
    layer: int
    size: int
    cost: int
    consumer: tuple[Any, ...]


def llama(channels: int = 16) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=channels, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def _at(name: str, width: int) -> tuple[Any, ...]:
    return ((name, 1, (("outer", width, 0),)),)


def units(channels: int) -> list[Unit]:
    out = []
    for i in range(2):
        base = f"model.layers.{i}"
        out.append(
            Unit(f"heads{i}", "heads", i, 4, 1024, _at(f"{base}.self_attn.o_proj.weight", 8))
        )
        out.append(Unit(f"mlp{i}", "mlp", i, channels, 96, _at(f"{base}.mlp.down_proj.weight", 1)))
    return out


def by_hooks(model: nn.Module, groups: list[Unit]) -> Callable[[dict[str, Tensor]], Any]:
    """The oracle of pruning: the mask multiplies the consumer's input."""

    def instantiate(bools: dict[str, Tensor]) -> Any:
        def loss(batch: dict[str, Tensor], inside: dict[str, Tensor]) -> float:
            handles = []
            assert not any(bool((inside[name] & ~bools[name]).any()) for name in bools)
            for group in groups:
                module = model.get_submodule(group.consumer[0][0].rpartition(".")[0])
                width = module.weight.shape[1] // group.size
                scale = inside[group.name].float().repeat_interleave(width)
                handles.append(
                    module.register_forward_pre_hook(lambda m, a, scale=scale: (a[0] * scale,))
                )
            with torch.no_grad():
                value = float(model(**batch, use_cache=False).loss)
            for handle in handles:
                handle.remove()
            return value

        return loss

    return instantiate


def batches(count: int = 4) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    ids = [torch.randint(50, (3, 11), generator=g) for _ in range(count)]
    return [{"input_ids": x, "labels": x} for x in ids]


def test_callback_checkpoint_and_resume(tmp_path: Any) -> None:
    model, groups = llama(), units(16)
    instantiate = by_hooks(model, groups)
    options = ScoreSettings(steps=6, age=4, block=2, init_batches=2)
    whole = run(model, groups, instantiate, batches(), options)
    seen: list[Step] = []

    def stop(step: Step) -> None:
        seen.append(step)
        if step.step == 3:
            raise KeyboardInterrupt

    file = tmp_path / "search.pt"
    with pytest.raises(KeyboardInterrupt):
        run(model, groups, instantiate, batches(), options, callback=stop, checkpoint=file)
    again = run(
        model, groups, instantiate, batches(), options, callback=seen.append, checkpoint=file
    )
    assert [step.step for step in seen] == [1, 2, 3, 4, 5, 6]
    assert torch.equal(again.probabilities, whole.probabilities)


@pytest.mark.parametrize("method", METHODS)
def test_scores_have_the_units_and_leave_the_model_alone(method: str) -> None:
    model, groups = llama().train(), units(16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    values = importance(model, batches(), groups, method)
    assert {k: len(v) for k, v in values.items()} == {g.name: g.size for g in groups}
    assert all(bool((v > 0).all()) for v in values.values())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    space = Space.build(groups, ScoreSettings(keep=0.5), values, block=1)
    kept = space.final(space.pool(standardise(space, values, method)), ScoreSettings(keep=0.5))
    assert 0.45 * space.budget_base < float(space.cost @ kept.double()) <= 0.5 * space.budget_base


def test_taylor_is_the_squared_derivative_by_the_mask() -> None:
    model, groups = llama(), units(16)
    data = batches(2)
    values = importance(model, data, groups, "taylor")
    expected = torch.zeros(16, dtype=torch.float64)
    for batch in data:
        mask = torch.ones(16, requires_grad=True)
        module = model.get_submodule("model.layers.1.mlp.down_proj")
        handle = module.register_forward_pre_hook(lambda m, a, mask=mask: (a[0] * mask,))
        (grad,) = torch.autograd.grad(model(**batch).loss, mask)
        handle.remove()
        expected += grad.double().square() / 2
    torch.testing.assert_close(values["mlp1"], expected, rtol=1e-3, atol=1e-10)


def test_blocks_join_neighbours_in_importance() -> None:
    group = Unit("m", "mlp", 0, 128, 3, ())
    values = {"m": torch.randperm(128, generator=torch.Generator().manual_seed(0)).double()}
    space = Space.build([group], ScoreSettings(block=32), values)
    assert space.cost.tolist() == [96.0] * 4
    assert bool(
        (space.bools(torch.tensor([True, False, False, False]))["m"] == (values["m"] > 95)).all()
    )


def test_bad_requests_are_named() -> None:
    with pytest.raises(PlanError, match="method"):
        importance(llama(), batches(), units(16), "best")
    with pytest.raises(PlanError, match="batch"):
        importance(llama(), [], units(16), "wanda")
    with pytest.raises(BudgetError, match="group"):
        Space.build([], ScoreSettings(), {})


def test_search_on_the_public_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    import fxmem
    from fxmem.prune.shrink import submodels as instances

    model, data, modules = llama(), batches(), []
    hollow = instances._hollow
    monkeypatch.setattr(instances, "_hollow", lambda m: modules.append(hollow(m)) or modules[-1])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    seen: list[Step] = []
    options = scored(steps=4, samples=2, age=2, block=2)
    masks = fxmem.search(model, data, options, callback=seen.append)
    # All sub-models are slices under one module, whose own parameters have no storage.
    assert seen[-1].counts.submodels == 4 and len(modules) == 1
    assert all(p.is_meta for p in modules[0].parameters())
    last = fxmem.Masks.from_bools(fxmem.coupling(model), seen[-1].bools())
    assert last == masks
    small = fxmem.materialize(model, masks)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert bool(torch.isfinite(small(**data[0]).loss))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    values, baseline = fxmem.score(model, data, "wanda")
    kept = {name: len(baseline.kept(name)) for name in values}
    assert 0 < sum(kept.values()) < sum(len(v) for v in values.values())
    with pytest.raises(PlanError, match="kind"):
        fxmem.search(model, data, Prune(kinds=("feathers",)))
