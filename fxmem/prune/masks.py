"""Masks: which units of each group stay. Immutable, hashable, composable, serialisable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from fxmem.errors import MaskError
from fxmem.prune.units import Coupling, positions

Groups = tuple[tuple[str, int, tuple[int, ...]], ...]


def fingerprint(coupling: Coupling) -> str:
    """Of the groups and parameter shapes: masks fit models that share it."""
    text = repr((coupling.shapes, [(g.name, g.size, g.members) for g in coupling.groups]))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Masks:
    """``entries``: (group name, group size, kept unit indices, ascending), one per group."""

    model: str
    entries: Groups

    def __post_init__(self) -> None:
        for name, size, kept in self.entries:
            if list(kept) != sorted(set(kept)) or any(not 0 <= i < size for i in kept):
                raise MaskError(f"kept units of {name} are not ascending indices below {size}")

    @classmethod
    def full(cls, coupling: Coupling) -> Masks:
        return cls.from_kept(coupling, {})

    @classmethod
    def from_kept(cls, coupling: Coupling, kept: Mapping[str, tuple[int, ...]]) -> Masks:
        """Groups not named stay whole."""
        for name in kept:
            coupling.group(name)
        return cls(
            fingerprint(coupling),
            tuple(
                (g.name, g.size, tuple(int(i) for i in kept.get(g.name, range(g.size))))
                for g in coupling.groups
            ),
        )

    @classmethod
    def from_bools(cls, coupling: Coupling, bools: Mapping[str, Tensor]) -> Masks:
        for name, b in bools.items():
            if tuple(b.shape) != (coupling.group(name).size,):
                raise MaskError(f"mask of {name} has shape {tuple(b.shape)}")
        return cls.from_kept(
            coupling, {n: tuple(b.bool().nonzero()[:, 0].tolist()) for n, b in bools.items()}
        )

    def check(self, coupling: Coupling) -> None:
        if self.model != fingerprint(coupling):
            raise MaskError("these masks were made for another model")

    def kept(self, name: str) -> tuple[int, ...]:
        for n, _, kept in self.entries:
            if n == name:
                return kept
        raise MaskError(f"the masks have no group {name!r}")

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """Group name -> (kept, size)."""
        return {n: (len(kept), size) for n, size, kept in self.entries}

    def after(self, first: Masks) -> Masks:
        """These masks, made for the model that ``first`` gives, as masks of the model before."""
        if [n for n, _, _ in self.entries] != [n for n, _, _ in first.entries]:
            raise MaskError("masks of different groups do not compose")
        out = []
        for (name, size, kept), (_, before, base) in zip(self.entries, first.entries, strict=True):
            if size != len(base):
                raise MaskError(f"{name}: {size} units after masks that keep {len(base)}")
            out.append((name, before, tuple(base[i] for i in kept)))
        return Masks(first.model, tuple(out))

    def sparsity(self, coupling: Coupling) -> dict[str, float]:
        """Fractions removed: of prunable parameters, of all parameters."""
        self.check(coupling)
        cost = sum(g.cost * g.size for g in coupling.groups)
        gone = sum(g.cost * (g.size - len(self.kept(g.name))) for g in coupling.groups)
        total = sum(prod(s) for _, s in coupling.shapes)
        return {"prunable": gone / cost if cost else 0.0, "parameters": gone / total}

    def to_dict(self) -> dict[str, Any]:
        return {"version": 1, "model": self.model, "entries": [list(e) for e in self.entries]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Masks:
        try:
            entries = tuple((str(n), int(s), tuple(map(int, k))) for n, s, k in data["entries"])
            return cls(str(data["model"]), entries)
        except (KeyError, TypeError, ValueError) as error:
            raise MaskError(f"not a table of masks: {error}") from error

    def to_json(self) -> str:
        return json.dumps(self.to_dict())


def axis_keeps(coupling: Coupling, masks: Masks) -> dict[tuple[str, int], Tensor]:
    """``(parameter, axis)`` -> boolean positions that stay, for every sliced axis."""
    masks.check(coupling)
    shapes = dict(coupling.shapes)
    out: dict[tuple[str, int], Tensor] = {}
    for g in coupling.groups:
        kept = masks.kept(g.name)
        if len(kept) == g.size:
            continue
        for name, axis, path in g.members:
            keep = positions(shapes[name][axis], path, g.size, kept)
            key = (name, axis)
            out[key] = out[key] & keep if key in out else keep
    return out


def consumer_keeps(coupling: Coupling, masks: Masks) -> dict[tuple[str, int], Tensor]:
    """As :func:`axis_keeps`, consumers only."""
    wanted = {(n, i) for g in coupling.groups for n, i, _ in g.consumer}
    return {k: v for k, v in axis_keeps(coupling, masks).items() if k in wanted}
