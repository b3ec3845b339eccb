"""Networks of every kind: convolutions, batch norm, concatenation, vision transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from networks import NETWORKS, build
from torch import Tensor, nn

import fxmem
from fxmem.errors import CaptureError, MaskError, PlanError
from fxmem.prune.coupling.calls import Inputs, results
from fxmem.prune.shrink.slicing import buffer_slices, cut, slices
from fxmem.prune.units.masks import consumer_keeps

UNITS = {
    "mlp": [12, 10],
    # what is added in a residual stream goes together; of grouped convolutions whole groups
    "resnet": [8, 12, 12, 16, 16],
    "resnext": [8, 2, 2],
    "mobilenet": [8, 12, 4, 16, 4],
    "convnext": [24, 24],
    "unet": [6, 8, 10, 7, 9, 6],
    "group norm": [4],
}


def every_second(units: fxmem.Coupling) -> fxmem.Masks:
    inner = [g for g in units.groups if g.kind != "width"]
    return fxmem.Masks.from_kept(units, {g.name: tuple(range(1, g.size, 2)) for g in inner})


def silenced(model: nn.Module, units: fxmem.Coupling, masks: fxmem.Masks) -> nn.Module:
    """A copy whose consumers have zeros for removed units: the oracle of masks."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for (name, axis), keep in consumer_keeps(units, masks).items():
            twin.get_parameter(name).movedim(axis, -1)[..., ~keep] = 0
    return twin


def check(model: nn.Module, given: Inputs, units: fxmem.Coupling, masks: fxmem.Masks) -> nn.Module:
    """Values, gradients and new statistics of the smaller model are those of the masked one."""
    small = fxmem.materialize(model, masks, units)
    twin = silenced(model, units, masks)
    with torch.no_grad(), fxmem.masked(model, masks, units):
        for got, want in zip(results(model, given), results(twin, given), strict=True):
            assert (got - want).abs().max() <= 1e-10 * want.abs().max()
    for training in (False, True):
        model.train(training), small.train(training)
        model.zero_grad(), small.zero_grad()
        with fxmem.masked(model, masks, units):
            wants = results(model, given)
            sum((w.sin() * w).mean() for w in wants).backward()  # type: ignore[union-attr]
        gots = results(small, given)
        sum((g.sin() * g).mean() for g in gots).backward()  # type: ignore[union-attr]
        for got, want in zip(gots, wants, strict=True):
            assert (got - want).abs().max() <= 1e-10 * want.abs().max()
        parts, top = slices(units, masks), _top(model)
        for (name, p), q in zip(model.named_parameters(), small.parameters(), strict=True):
            assert q.is_contiguous() and q.data_ptr() != p.data_ptr()
            if p.grad is not None and q.numel():
                assert q.grad is not None
                assert (cut(p.grad, parts.get(name, [])) - q.grad).abs().max() < 1e-10 * top, name
        held = buffer_slices(units, masks)
        for (name, b), c in zip(model.named_buffers(), small.buffers(), strict=True):
            assert torch.allclose(cut(b, held.get(name, [])), c, rtol=0, atol=1e-10), name
    return small


def _top(model: nn.Module) -> float:
    return max(1.0, *(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None))


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_become_smaller(name: str) -> None:
    model, x = build(name)
    units = fxmem.coupling(model, x)
    assert [g.size for g in units.groups] == UNITS[name]
    covered = {(n, i) for g in units.groups for n, i, _ in g.members}
    named = {(n, i) for n, i, _ in units.blocked}
    every = {(n, i) for n, p in model.named_parameters() for i, k in enumerate(p.shape) if k > 1}
    assert every <= covered | named
    small = check(model, Inputs((x,), {}), units, every_second(units))
    assert str(small) != str(model)  # sizes that modules repeat have followed


def test_sizes_in_repr_and_state_dict() -> None:
    model, x = build("resnext")
    units = fxmem.coupling(model, x)
    small: Any = fxmem.materialize(model, every_second(units), units)
    second = small.blocks[0].second[0]
    assert str(second) == "Conv2d(6, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))"
    assert small.blocks[0].second[1].num_features == 6
    assert small.state_dict()["blocks.0.second.1.running_mean"].shape == (6,)
    with pytest.raises(MaskError, match="0 units are kept where 1 must be"):
        fxmem.Masks.from_kept(units, {units.groups[0].name: ()})


def test_multiply_adds_of_convolutions_are_counted() -> None:
    model, x = build("mobilenet")
    units = fxmem.coupling(model, x)
    masks = every_second(units)
    counts = [multiply_adds(m, x) for m in (fxmem.materialize(model, masks, units), model)]
    assert masks.sparsity(units)["macs"] == pytest.approx(1 - counts[0] / counts[1], abs=1e-12)


def multiply_adds(model: nn.Module, x: Tensor) -> int:
    total = 0

    def count(module: Any, args: Any, out: Tensor) -> None:
        nonlocal total
        total += out.numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    model(x)
    return total


TINY: dict[str, Any] = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
    image_size=8, patch_size=4,
)  # fmt: skip
SIZES: dict[str, Any] = dict(hidden_sizes=[8, 12], depths=[1, 1])
PIXELS = {"pixel_values": (2, 3, 8, 8)}
VISION: dict[str, Any] = {
    "vit": (lambda: T.ViTForImageClassification(T.ViTConfig(**TINY)), "kv_groups", PIXELS),
    "clip vision": (
        lambda: T.CLIPVisionModel(T.CLIPVisionConfig(**TINY)), "kv_groups", PIXELS,
    ),
    "clip text": (
        lambda: T.CLIPTextModel(T.CLIPTextConfig(
            vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=40, max_position_embeddings=20, eos_token_id=59,
        )), "kv_groups", {},
    ),
    "resnet": (
        lambda: T.ResNetForImageClassification(
            T.ResNetConfig(embedding_size=8, layer_type="basic", **SIZES)
        ), "channels", {"pixel_values": (2, 3, 32, 32)},
    ),
    "convnext": (
        lambda: T.ConvNextForImageClassification(T.ConvNextConfig(num_stages=2, **SIZES)),
        "mlp_channels", {"pixel_values": (2, 3, 32, 32)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VISION)
def test_models_of_transformers_become_smaller(name: str, tmp_path: Path) -> None:
    make, kind, shapes = VISION[name]
    torch.manual_seed(0)
    model = make().double().eval()
    given = {k: torch.randn(s, dtype=torch.float64) for k, s in shapes.items()}
    if not given:
        given = {"input_ids": torch.arange(22).view(2, 11)}
    units = fxmem.coupling(model, kwargs=given)
    assert kind in {g.kind for g in units.groups}
    small = check(model, Inputs((), given), units, every_second(units)).eval()
    fxmem.save_pretrained(small, tmp_path)
    loaded = fxmem.from_pretrained(tmp_path)
    for a, b in zip(*(results(m, Inputs((), given)) for m in (small, loaded)), strict=True):
        assert torch.equal(a, b)


def test_a_smaller_network_is_an_ordinary_module(tmp_path: Path) -> None:
    model, x = build("resnet")
    units = fxmem.coupling(model, x)
    small = fxmem.materialize(model, every_second(units), units)
    with pytest.raises(PlanError, match="no model of transformers"):
        fxmem.save_pretrained(small, tmp_path)
    torch.save(small, tmp_path / "small")
    loaded = torch.load(tmp_path / "small", weights_only=False)
    assert torch.equal(loaded(x), small(x))
    batches = [{"x": torch.randn_like(x)} for _ in range(2)]
    wrapped = Lossy(model)
    units = fxmem.coupling(wrapped, x)
    masks = fxmem.search(wrapped, batches, fxmem.Prune(keep=0.5, steps=4), coupled=units)
    found = masks.sparsity(units)["parameters"]
    assert 0.4 < found < 1
    assert fxmem.materialize(wrapped, masks, units)(x).isfinite()


class Lossy(nn.Module):
    """A network that returns its loss, as a search needs it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.model(x).square().mean()
        return found


def test_without_an_example_a_network_is_refused_by_name() -> None:
    model, _ = build("resnet")
    with pytest.raises(CaptureError, match=r"ResNet has no embedding.*example"):
        fxmem.coupling(model)
