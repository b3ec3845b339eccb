"""Configs with which the stock class of transformers is the smaller model.

Which fields repeat the sizes that masks cut is found by trial, as no field is known by its name: a
set of fields is right if the class that it builds has the shapes of the smaller model, and with its
weights gives the same logits. Sizes that differ by layer go into ``per_layer_config``, which few
classes read.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import nn

from fxmem._compat.graph import call_impl
from fxmem.frontend.experts import streamable
from fxmem.prune.coupling.calls import results, trials
from fxmem.prune.shrink.size_attributes import agrees, evaluating
from fxmem.prune.units.masks import BLOCKS, Masks
from fxmem.prune.units.units import Coupling, UnitGroup

FIELDS = 3
"""Most fields that repeat the size of one kind of unit."""
Field = tuple[str, int]
"""Name of a field, and what it holds per unit of its group."""


class MetaParameters:
    """Inside the context a parameter that a module registers goes to meta as soon as it is there,
    so at most one dense parameter has storage."""

    def __enter__(self) -> None:
        self.before = nn.Module.register_parameter
        before = self.before

        def register(module: nn.Module, name: str, p: nn.Parameter | None) -> None:
            if p is not None and p.device.type != "meta":
                p = nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
            before(module, name, p)

        nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]

    def __exit__(self, *_: object) -> None:
        nn.Module.register_parameter = self.before  # type: ignore[method-assign]


def stock_config(small: nn.Module, plan: Coupling, masks: Masks) -> Any | None:
    """The config that makes ``type(small)`` the smaller model; None where there is none.

    Args:
        small: a model of transformers.
        plan: coupling of the dense model.
        masks: what `small` was made with.
    """
    config: Any = copy.deepcopy(small.config)
    shapes = {n: tuple(p.shape) for n, p in small.named_parameters()}
    counts = masks.counts
    for kind in () if _shapes(small, config) == shapes else dict.fromkeys(map(_kind, plan.groups)):
        cut = [g for g in plan.groups if g.kind == kind and counts[g.name][0] < g.size]
        if not cut:
            continue
        if any(not masks.kept(g.name) for g in cut):
            return None  # a block that is not there has no size
        groups = [g for g in plan.groups if g.kind == kind]
        names = {n for g in groups for n, _, _ in g.members}
        for fields in _choices(config, groups):
            tried = _changed(config, groups, masks, fields)
            found = None if tried is None else _shapes(small, tried)
            if found is not None and _same(found, shapes, names, groups):
                config = tried
                break
        else:
            return None
    return config if _equal(small, config) else None


def _kind(group: UnitGroup) -> str:
    return group.kind


def _choices(config: Any, groups: Sequence[UnitGroup]) -> Iterator[tuple[Field, ...]]:
    """Sets of fields that may repeat the number of units, small ones first."""
    fields = [
        (name, value // groups[0].size)
        for name, value in config.to_dict().items()
        if type(value) is int and value and all(
            value % g.size == 0 and value // g.size in g.sizes for g in groups
        )
    ]  # fmt: skip
    for count in range(1, FIELDS + 1):
        yield from combinations(fields, count)


def _changed(
    config: Any, groups: Sequence[UnitGroup], masks: Masks, fields: tuple[Field, ...]
) -> Any | None:  # fmt: skip
    """A copy of a config with other values; None where it takes none such."""
    counts, out = masks.counts, copy.deepcopy(config)
    layers: dict[int, dict[str, int]] = {}
    try:
        _fix_heads(out)
        _fix_eps(out, groups, masks)
        for name, factor in fields:
            values = {g.layer: factor * counts[g.name][0] for g in groups}
            if len(set(values.values())) == 1:
                setattr(out, name, next(iter(values.values())))
                continue
            for layer, value in values.items():
                layers.setdefault(layer, {})[name] = value
        if layers:
            before = config.to_dict().get("per_layer_config") or {}
            for layer, entries in before.items():
                layers[int(layer)] = {**entries, **layers.get(int(layer), {})}
            out.per_layer_config = layers
        again = type(out).from_dict(out.to_dict())  # as it is read from a file, with all its checks
    except Exception:  # a config checks its values as it likes
        return None
    again._attn_implementation = config._attn_implementation
    again._experts_implementation = getattr(config, "_experts_implementation", None)
    return again


def _fix_heads(config: Any) -> None:
    """The size of a head is no longer the width over the number of heads."""
    heads, width = (
        getattr(config, n, None) for n in ("num_attention_heads", "hidden_size")
    )  # a config of heads of its own size has the field already
    if getattr(config, "head_dim", None) is None and heads and width:
        config.head_dim = width // heads


def _fix_eps(config: Any, groups: Sequence[UnitGroup], masks: Masks) -> None:
    """The norms of a smaller width have another eps: in every field that holds the old one."""
    for group in groups:
        for norm in group.norms[:1]:
            for name, value in config.to_dict().items():
                if type(value) is float and value == norm.eps:
                    setattr(config, name, norm.eps * norm.width / len(masks.kept(group.name)))


def _shapes(small: nn.Module, config: Any) -> dict[str, tuple[int, ...]] | None:
    """Of the parameters of the stock class; None where it cannot be built."""
    try:
        with torch.device("meta"):
            made = type(small)(copy.deepcopy(config))
    except Exception:  # a class refuses sizes in ways of its own
        return None
    return {n: tuple(p.shape) for n, p in made.named_parameters()}


def _same(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]],
    names: set[str], groups: Sequence[UnitGroup],
) -> bool:  # fmt: skip
    """Whether the axes that units of one kind are cut along have the right length."""
    if found.keys() != wanted.keys():
        return False
    cut = {(n, axis) for g in groups for n, axis, _ in g.members}
    return all(
        found[n][axis] == wanted[n][axis]
        for n in names
        for axis in range(len(wanted[n]))
        if (n, axis) in cut
    )


def _equal(small: nn.Module, config: Any) -> bool:
    """Whether the stock class gives the logits of ``small`` with its weights."""
    inputs = trials(small)
    device = inputs[0].tensors[0].device
    try:
        with MetaParameters():
            stock = type(small)(copy.deepcopy(config)).eval()
        stock.load_state_dict(small.state_dict(), assign=True)
        stock.to(device)
        with torch.no_grad(), evaluating(small), streamable(small), streamable(stock):
            wanted = [results(small, x, call_impl(small)) for x in inputs]
            return agrees(stock, inputs, wanted, next(iter(BLOCKS)))
    except Exception:  # a class that the config does not make this model
        return False


__all__ = ["MetaParameters", "stock_config"]
