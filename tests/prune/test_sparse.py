"""A step of sparse training on Hugging Face models: sub-models' gradients in the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from double import everything_in_double
from prune_cases import build, coupled
from sparse_cases import RATIOS, batch, drawn, gradients, run_rank

import fxmem
from fxmem.errors import BudgetError, MaskError


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llama_mha_tied", ("kv_groups", "mlp_channels")),
        ("gpt2", ("kv_groups", "mlp_channels")),
        ("mixtral", ("experts",)),
        ("qwen3_moe", ("kv_groups", "mlp_channels")),
    ],
)
def test_equals_the_masked_dense_model(name: str, kinds: tuple[str, ...]) -> None:
    with everything_in_double():
        model: Any = build(name)
        frozen, weight = next(iter(model.named_parameters()))
        weight.requires_grad_(name != "gpt2")
        units = fxmem.coupling(model)
        empty = next(g.name for g in units.groups if g.kind in kinds)
        masks = drawn(units, kinds, empty if name == "gpt2" else "")
        mean = 0.0
        for ratio, mask in zip(RATIOS, masks, strict=True):
            with fxmem.masked(model, mask, units):
                loss = model(**batch()).loss
                (ratio / len(masks) * loss).backward()
            mean += ratio / len(masks) * loss.item()
        want = gradients(model)
        model.zero_grad()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for times in (1, 2):  # a second step adds to what is there
            got = fxmem.sparse_backward(model, masks, batch(), ratios=RATIOS, coupled=units)
            assert abs(got - mean) < 1e-10
            top = max(float(g.abs().max()) for g in want.values())
            for key, grad in want.items():
                error = (model.get_parameter(key).grad - times * grad).abs().max()
                assert float(error) < 1e-10 * max(1.0, top), key
        assert (frozen in gradients(model)) == (name != "gpt2")
        assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    mp.spawn(run_rank, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    model: Any = build("llama")
    masks = drawn(coupled("llama"), ("kv_groups", "mlp_channels"))
    want = fxmem.sparse_backward(model, masks, batch(), ratios=RATIOS)
    for rank in (0, 1):
        loss, grads = torch.load(tmp_path / f"{rank}.pt")
        assert abs(loss - want) < 1e-12
        for name, grad in gradients(model).items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-12, atol=1e-12)


def test_refusals() -> None:
    model: Any = build("llama")
    units = coupled("llama")
    full = fxmem.Masks.full(units)
    with pytest.raises(BudgetError, match="one ratio per mask"):
        fxmem.sparse_backward(model, [full], batch(), ratios=[1.0, 2.0], coupled=units)
    with pytest.raises(BudgetError, match="1 masks, 0 ratios"):
        fxmem.sparse_backward(model, [full], batch(), ratios=[], coupled=units)
    with pytest.raises(BudgetError, match="0 masks"):
        fxmem.sparse_backward(model, [], batch(), coupled=units)
    (width,) = (g for g in units.groups if g.kind == "width")
    half = torch.arange(width.size) < width.size // 2
    narrow = fxmem.Masks.from_bools(units, {width.name: half})
    with pytest.raises(MaskError, match="residual stream"):
        fxmem.sparse_backward(model, [narrow], batch(), coupled=units)
    with pytest.raises(MaskError):
        fxmem.sparse_backward(build("gpt2"), [full], batch())
