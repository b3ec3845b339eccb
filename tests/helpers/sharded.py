"""Models under ``fully_shard``: plain and streamed runs of one rank, and what they communicate."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import tiny
import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

import fxmem

LENGTHS = (37, 64)
"""One per rank, so the ranks have different numbers of chunks."""


def layers_of(model: Any) -> Any:
    return model.model.layers


def by_layer(model: Any, **options: Any) -> None:
    """As users and accelerate write it: every layer, then the rest."""
    for layer in layers_of(model):
        fully_shard(layer, **options)
    fully_shard(model, **options)


def root_only(model: Any, **options: Any) -> None:
    fully_shard(model, **options)


def head_apart(model: Any, **options: Any) -> None:
    """The last norm and the head in a group of their own."""
    for layer in layers_of(model):
        fully_shard(layer, **options)
    fully_shard([model.model.norm, model.lm_head], **options)
    fully_shard(model, **options)


def by_accelerate(model: Any) -> None:
    """As ``accelerate launch`` with FSDP2 does it, by its own function: also the embedding, and the
    last norm with the head, are groups.
    """
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True,
        transformer_cls_names_to_wrap=[type(layers_of(model)[0]).__name__],
        cpu_ram_efficient_loading=False,
    )  # fmt: skip
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", is_main_process=True
    )
    fsdp2_prepare_model(accelerator, model)


WAYS: dict[str, Callable[..., None]] = {
    "layers": by_layer, "root": root_only, "head": head_apart, "accelerate": by_accelerate
}  # fmt: skip


def stream(model: nn.Module, chunk: int, **options: Any) -> None:
    fxmem.transform(model, fxmem.Plan(stream=fxmem.Stream(chunk=chunk, **options)))


KINDS = {
    "all_gather_single": "gathers", "reduce_scatter_single": "reductions",
    "all_reduce": "all-reduces",
}  # fmt: skip
"""What FSDP2 calls, by kind."""


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """Collectives inside, by kind."""
    found: Counter[str] = Counter()
    names = [n for n in KINDS if hasattr(dist, n)]
    was = {name: getattr(dist, name) for name in names}

    def count(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found[KINDS[name]] += 1
            return was[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, count(name))
    try:
        yield found
    finally:
        for name, fn in was.items():
            setattr(dist, name, fn)


@contextlib.contextmanager
def whole_at_once() -> Iterator[list[int]]:
    """The most elements of parameters that are whole, or on their way, at one time."""
    there: dict[Any, int] = {}
    most = [0]
    names = ("unshard", "wait_for_unshard", "reshard")
    was = {name: getattr(FSDPParamGroup, name) for name in names}

    def follow(name: str) -> Callable[..., Any]:
        def call(group: Any, *args: Any, **kwargs: Any) -> Any:
            result = was[name](group, *args, **kwargs)
            gathered = group.is_unsharded or group._all_gather_result is not None
            there[group] = sum(p._orig_size.numel() for p in group.fsdp_params) * gathered
            most[0] = max(most[0], sum(there.values()))
            return result

        return call

    for name in names:
        setattr(FSDPParamGroup, name, follow(name))
    try:
        yield most
    finally:
        for name, fn in was.items():
            setattr(FSDPParamGroup, name, fn)


def whole(value: Tensor | None) -> Tensor | None:
    return value.full_tensor().clone() if hasattr(value, "full_tensor") else value  # type: ignore[union-attr]


def state(model: nn.Module) -> dict[str, Any]:
    """Weights and gradients, whole, by name."""
    out: dict[str, Any] = {}
    for name, p in model.named_parameters():
        out[name] = whole(p.detach())
        out[f"{name}.grad"] = whole(p.grad)
    return out


def steps(
    model: nn.Module, batches: list[dict[str, Tensor]], loss: Callable[..., Tensor] | None = None
) -> list[Any]:
    """A step of SGD with momentum per batch; losses, then weights and gradients of the last."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found: list[Any] = []
    for batch in batches:
        optimizer.zero_grad()
        value = model(**batch).loss if loss is None else loss(model, batch)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append(value.item())
    return [found, state(model)]


def inputs(rank: int, seed: int = 0) -> dict[str, Tensor]:
    length = LENGTHS[rank % 2]
    batch = tiny.batch(2, length, padding=("left", "mixed")[rank % 2])
    batch["input_ids"] = (batch["input_ids"] + seed) % tiny.VOCAB
    return batch


def difference(found: Any, want: Any) -> float:
    """The largest one of losses, weights and gradients."""
    (losses, one), (others, two) = found, want
    assert one.keys() == two.keys()
    assert all((one[k] is None) == (two[k] is None) for k in one)
    parts = [float((one[k] - two[k]).abs().max()) for k in one if one[k] is not None]
    return max([*parts, *(abs(a - b) for a, b in zip(losses, others, strict=True))])
