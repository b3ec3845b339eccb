"""Masks: which units of each group stay. Immutable, hashable, composable, serialisable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from fxmem.errors import MaskError
from fxmem.prune.units.units import Coupling, Member, UnitGroup, positions

KINDS = ("kv_groups", "mlp_channels", "channels", "experts", "width")
BLOCKS = {"kv_groups": "attention_blocks", "mlp_channels": "mlp_blocks"}
"""Kinds whose groups may lose every unit -> the kind of block that a whole group is."""

Groups = tuple[tuple[str, int, tuple[int, ...]], ...]


def fingerprint(coupling: Coupling) -> str:
    """Of the groups and parameter shapes: masks fit models that share it.

    Experts and the width are left out: the shapes fix them, and masks of before there were such
    units still fit.
    """
    fixed = ("experts", "width")
    groups = [(g.name, g.size, g.members) for g in coupling.groups if g.kind not in fixed]
    text = repr((coupling.shapes, groups))
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
        """Every unit stays."""
        return cls.from_kept(coupling, {})

    @classmethod
    def from_kept(cls, coupling: Coupling, kept: Mapping[str, tuple[int, ...]]) -> Masks:
        """Groups not named stay whole.

        Raises:
            MaskError: a group the model does not have, indices out of order or range, or fewer
                experts than a token chooses.
        """
        for name in kept:
            coupling.group(name)
        masks = cls(
            fingerprint(coupling),
            tuple(
                (g.name, g.size, tuple(int(i) for i in kept.get(g.name, range(g.size))))
                for g in coupling.groups
            ),
        )
        masks.check(coupling)
        return masks

    @classmethod
    def without(cls, coupling: Coupling, *paths: str) -> Masks:
        """Everything stays but the attention and MLP blocks in the modules at ``paths``.

        A block goes as the group of its heads or channels with no unit left, so it adds nothing to
        the residual stream but the bias of its output projection, where it has one. A block of
        experts loses all channels of every expert; its router stays.

        Raises:
            MaskError: no block of heads or channels is at a path.
        """
        kept: dict[str, tuple[int, ...]] = {}
        for path in paths:
            blocks = [g for g in coupling.groups if _inside(g, path) and g.kind in BLOCKS]
            if not blocks:
                raise MaskError(
                    f"nothing in {path!r} can be removed as a block",
                    advice="name a module that holds a group of heads or channels: "
                    + ", ".join(g.name for g in coupling.groups if g.kind in BLOCKS),
                )
            kept |= {g.name: () for g in blocks}
        return cls.from_kept(coupling, kept)

    @classmethod
    def from_bools(cls, coupling: Coupling, bools: Mapping[str, Tensor]) -> Masks:
        """``bools``: group name -> ``[units]``; for KV groups also ``[query heads]``.

        Raises:
            MaskError: a wrong shape, or query heads of one KV group not all kept or removed.
        """
        kept: dict[str, tuple[int, ...]] = {}
        for name, b in bools.items():
            units = _per_unit(coupling.group(name), b.bool())
            kept[name] = tuple(units.nonzero()[:, 0].tolist())
        return cls.from_kept(coupling, kept)

    def check(self, coupling: Coupling) -> None:
        """Whether these masks fit a model.

        Raises:
            MaskError: they were made for another, or keep fewer experts than a token chooses.
        """
        if self.model != fingerprint(coupling):
            raise MaskError("these masks were made for another model")
        counts = self.counts
        for g in coupling.groups:
            left, _ = counts.get(g.name, (g.size, g.size))
            if left < g.least:
                if not g.router:
                    raise MaskError(
                        f"{left} units are kept where {g.least} must be", module=g.name,
                        advice="keep one at least: a convolution without channels does not run",
                    )  # fmt: skip
                raise MaskError(
                    f"{left} experts are kept where every token chooses {g.least}",
                    module=g.name,
                    advice=f"keep at least {g.least} experts in layer {g.layer}, or remove the "
                    "whole block with Masks.without(coupling, path)",
                )

    def on(self, coupling: Coupling) -> Masks:
        """These masks, checked, with entries for experts and a width that they do not name: whole.

        Raises:
            MaskError: masks of another model.
        """
        self.check(coupling)
        named = {n: (n, size, kept) for n, size, kept in self.entries}
        if all(g.name in named for g in coupling.groups):
            return self
        every = ((g.name, g.size, tuple(range(g.size))) for g in coupling.groups)
        return Masks(self.model, tuple(named.get(e[0], e) for e in every))

    def kept(self, name: str) -> tuple[int, ...]:
        """Indices of the units of a group that stay, ascending.

        Raises:
            MaskError: there is no such group.
        """
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
        own = _with_widths(self.entries, {n: len(kept) for n, _, kept in first.entries})
        other = _with_widths(first.entries, {n: size for n, size, _ in self.entries})
        if [n for n, _, _ in own] != [n for n, _, _ in other]:
            raise MaskError("masks of different groups do not compose")
        out = []
        for (name, size, kept), (_, before, base) in zip(own, other, strict=True):
            if size != len(base):
                raise MaskError(f"{name}: {size} units after masks that keep {len(base)}")
            out.append((name, before, tuple(base[i] for i in kept)))
        return Masks(first.model, tuple(out))

    def sparsity(self, coupling: Coupling) -> dict[str, float]:
        """Fractions removed, 0 to 1.

        ``prunable``: of the parameters that units hold (units of the width, which all share, only
        if some are removed); ``parameters``: of all, a tied one counted
        once; ``bytes``: of their storage; ``macs``: of the multiply-adds of matrix products with
        parameters (attention scores and values not counted; of experts as many as one token
        chooses, so that removing experts saves their router's rows only).
        """
        masks = self.on(coupling)
        before = {n: list(s) for n, s in coupling.shapes}
        after = {n: list(s) for n, s in coupling.shapes}
        for (name, axis), keep in axis_keeps(coupling, masks).items():
            after[name][axis] = int(keep.sum())
        counted = [
            g for g in coupling.groups if g.kind != "width" or len(masks.kept(g.name)) < g.size
        ]
        held = {n for g in counted for n, _, _ in g.members}

        def removed(weight: Mapping[str, float]) -> float:
            whole = sum(w * prod(before[n]) for n, w in weight.items())
            return 1 - sum(w * prod(after[n]) for n, w in weight.items()) / whole if whole else 0.0

        found = {
            "prunable": removed(dict.fromkeys(held, 1)),
            "parameters": removed(dict.fromkeys(before, 1)),
            "bytes": removed(dict(coupling.item_sizes)),
        }
        for g in coupling.groups:
            for name, axis, _ in g.members if g.router else ():
                if (name, axis) not in {(n, i) for n, i, _ in g.router}:
                    before[name][axis] = after[name][axis] = 1  # each row chooses one
        return {**found, "macs": removed(dict(coupling.products))}

    def rounded(self, coupling: Coupling, multiple: Mapping[str, int] | int) -> Masks:
        """Counts raised to a multiple (per unit kind, or one for MLP channels), or left at zero.

        The units put back are those of lowest index; a count never exceeds the group's size.

        Raises:
            MaskError: a multiple below 1 or an unknown unit kind.
        """
        table = {"mlp_channels": multiple} if isinstance(multiple, int) else dict(multiple)
        for kind, m in table.items():
            if kind not in KINDS:
                raise MaskError(f"unknown unit kind {kind!r}", advice=f"one of {', '.join(KINDS)}")
            if m < 1:
                raise MaskError(f"multiple {m} of {kind} is below 1")
        masks = self.on(coupling)
        out: dict[str, tuple[int, ...]] = {}
        for g in coupling.groups:
            kept = masks.kept(g.name)
            wanted = min(g.size, -(-len(kept) // table.get(g.kind, 1)) * table.get(g.kind, 1))
            spare = [i for i in range(g.size) if i not in set(kept)]
            out[g.name] = tuple(sorted((*kept, *spare[: wanted - len(kept)])))
        return Masks.from_kept(coupling, out)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which :meth:`from_dict` reads."""
        return {"version": 1, "model": self.model, "entries": [list(e) for e in self.entries]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Masks:
        """Read what :meth:`to_dict` gives.

        Raises:
            MaskError: it is not a table of masks, or of a version that is not known.
        """
        try:
            if data["version"] != 1:
                raise MaskError(f"masks of version {data['version']!r}, this fxmem reads 1")
            entries = tuple((str(n), int(s), tuple(map(int, k))) for n, s, k in data["entries"])
            return cls(str(data["model"]), entries)
        except MaskError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise MaskError(f"not a table of masks: {error}") from error

    def to_json(self) -> str:
        """One line of JSON, the same for equal masks."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Masks:
        """Read masks from JSON.

        Raises:
            MaskError: the text is not JSON or not a table of masks.
        """
        try:
            return cls.from_dict(json.loads(text))
        except MaskError:
            raise
        except (ValueError, TypeError, RecursionError) as error:
            raise MaskError(f"masks are not valid JSON: {error}") from error


def _inside(group: UnitGroup, path: str) -> bool:
    return all(f"{name}.".startswith(f"{path}.") for name, _, _ in group.members)


def _with_widths(entries: Groups, sizes: Mapping[str, int]) -> Groups:
    """``entries`` and, whole, the widths that only ``sizes`` names."""
    named = {n for n, _, _ in entries}
    missing = [(n, k) for n, k in sizes.items() if n not in named and "width" in n.split(".")]
    return (*entries, *((n, k, tuple(range(k))) for n, k in missing))


def _per_unit(group: UnitGroup, mask: Tensor) -> Tensor:
    """``[units]`` from a mask per unit or, for KV groups, per query head."""
    if mask.dim() == 1 and len(mask) == group.size:
        return mask
    heads = {group.size * f for f in group.sizes}
    if group.kind != "kv_groups" or mask.dim() != 1 or len(mask) not in heads:
        raise MaskError(
            f"the mask of {group.name} has shape {tuple(mask.shape)}, not ({group.size},)"
        )
    rows = mask.view(group.size, -1)
    uneven = (rows != rows[:, :1]).any(1).nonzero()[:, 0].tolist()
    if uneven:
        raise MaskError(
            f"{group.name}: KV group {uneven[0]} keeps some of its query heads and not others",
            advice="keep or remove the query heads of one key/value head together",
        )
    return rows[:, 0]


def axis_keeps(coupling: Coupling, masks: Masks) -> dict[tuple[str, int], Tensor]:
    """``(parameter, axis)`` -> boolean positions that stay, for every sliced axis."""
    return _keeps(coupling, masks, [(g, g.members) for g in coupling.groups], coupling.shapes)


def buffer_keeps(coupling: Coupling, masks: Masks) -> dict[tuple[str, int], Tensor]:
    """As :func:`axis_keeps`, of the buffers that lose positions with the parameters."""
    return _keeps(coupling, masks, [(g, g.buffers) for g in coupling.groups], coupling.buffers)


def _keeps(
    coupling: Coupling, masks: Masks, places: Sequence[tuple[UnitGroup, tuple[Member, ...]]],
    known: tuple[tuple[str, tuple[int, ...]], ...],
) -> dict[tuple[str, int], Tensor]:  # fmt: skip
    masks = masks.on(coupling)
    shapes = dict(known)
    out: dict[tuple[str, int], Tensor] = {}
    for g, members in places:
        kept = masks.kept(g.name)
        if len(kept) == g.size:
            continue
        for name, axis, path in members:
            keep = positions(shapes[name][axis], path, g.size, kept)
            key = (name, axis)
            out[key] = out[key] & keep if key in out else keep
    return out


def consumer_keeps(coupling: Coupling, masks: Masks) -> dict[tuple[str, int], Tensor]:
    """As :func:`axis_keeps`, consumers of heads and channels only: experts are chosen, see
    :func:`router_keeps`, and the width is zero where it is written.
    """
    groups = [g for g in coupling.groups if g.kind != "width" and not g.router]
    wanted = {(n, i) for g in groups for n, i, _ in g.consumer}
    return {k: v for k, v in axis_keeps(coupling, masks).items() if k in wanted}


def router_keeps(coupling: Coupling, masks: Masks) -> dict[str, Tensor]:
    """Weight of a router -> boolean ``[experts]``, for every router that loses some."""
    wanted = {(n, i) for g in coupling.groups for n, i, _ in g.router}
    return {n: v for (n, i), v in axis_keeps(coupling, masks).items() if (n, i) in wanted}
