"""Blocks of parameters by module structure, never by name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from fxmem.errors import PlanError
from fxmem.plan.blocks import Blocks


@dataclass(frozen=True)
class Block:
    """Parameters that are active together; `names` are dotted, in registration order."""

    label: str
    names: tuple[str, ...]


def layer_lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    """Each outermost ModuleList whose children share one class and hold parameters."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        kinds = {type(item) for item in child} if isinstance(child, nn.ModuleList) else set()
        if (
            isinstance(child, nn.ModuleList)
            and len(kinds) == 1
            and next(child.parameters(), None) is not None
        ):
            yield path, child
        else:
            yield from layer_lists(child, f"{path}.")


def partition(model: nn.Module, layers_per_block: int = 1) -> list[Block]:
    """Blocks of `layers_per_block` successive layers, nearest the input first.

    A tied weight belongs to the first module that registers it. Parameters outside the layers
    and parameters that do not require grad are in no block.

    Raises:
        PlanError: `layers_per_block` below 1, or no layers that can train.
    """
    if layers_per_block < 1:
        raise PlanError(f"layers_per_block is {layers_per_block}", advice="give at least 1")
    # named_parameters reports a tied weight once, at its first use in module order
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    blocks = []
    for path, layers in layer_lists(model):
        for start in range(0, len(layers), layers_per_block):
            stop = min(start + layers_per_block, len(layers))
            paths = tuple(f"{path}.{i}." for i in range(start, stop))
            own = tuple(n for n in names if n.startswith(paths))
            if own:
                blocks.append(Block(f"{path}.{start}", own))
    if not blocks:
        raise PlanError("no layers that can train were found", advice="give the blocks as lists")
    return blocks


def outer_parameters(model: nn.Module) -> tuple[Block, Block]:
    """What is outside the layers: ``embed``, and ``head`` with everything after the layers.

    The largest modules without layers are taken whole; one that holds an nn.Embedding is ``embed``.
    """
    lists = [path for path, _ in layer_lists(model)]
    embed: list[str] = []
    inside: list[str] = [f"{path}." for path in lists]

    def walk(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            here = f"{path}{name}"
            if here in lists:
                continue
            if any(p.startswith(f"{here}.") for p in lists):
                walk(child, f"{here}.")
            elif any(isinstance(m, nn.Embedding) for m in child.modules()):
                embed.append(f"{here}.")

    walk(model, "")
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    outside = [n for n in names if not n.startswith(tuple(inside))]
    first = tuple(n for n in outside if n.startswith(tuple(embed)))
    return Block("embed", first), Block("head", tuple(n for n in outside if n not in set(first)))


def resolve(model: nn.Module, entries: Sequence[str], what: str) -> tuple[str, ...]:
    """Names of the parameters that `entries` (parameters or modules) stand for.

    Raises:
        PlanError: a name that the model does not have.
    """
    # every name of a tied weight stands for its first one
    first = {id(p): n for n, p in model.named_parameters()}
    every = list(model.named_parameters(remove_duplicate=False))
    found: dict[str, None] = {}
    for entry in entries:
        hit = [p for n, p in every if n == entry or n.startswith(f"{entry}.")]
        if not hit:
            raise PlanError(f"{what} names {entry!r}, which the model does not have")
        found.update(dict.fromkeys(first[id(p)] for p in hit))
    return tuple(found)


def from_lists(model: nn.Module, lists: Sequence[Sequence[str]]) -> list[Block]:
    """Blocks from lists of names of parameters or modules.

    Raises:
        PlanError: no block, an empty block, an unknown name, a frozen parameter, or a parameter in
            two blocks.
    """
    fixed = {n for n, p in model.named_parameters() if not p.requires_grad}
    blocks: list[Block] = []
    owner: dict[str, int] = {}
    for index, entries in enumerate(lists):
        found = resolve(model, entries, f"block {index}")
        if frozen := [n for n in found if n in fixed]:
            raise PlanError(f"block {index} holds {frozen[0]!r}, which does not require grad")
        if not found:
            raise PlanError(f"block {index} is empty")
        for name in found:
            if owner.setdefault(name, index) != index:
                raise PlanError(f"{name!r} is in blocks {owner[name]} and {index}")
        blocks.append(Block(f"block {index}", found))
    if not blocks:
        raise PlanError("the partition is empty", advice="give at least one block")
    return blocks


@dataclass(frozen=True)
class Partition:
    """A cover of all parameters that require grad.

    Attributes:
        blocks: what is active in turn.
        always: active in every visit.
        inactive: never active, updated like an inactive block.
        frozen: never learns.
        head: the parameters after the layers, where they are known.
    """

    blocks: tuple[Block, ...]
    always: tuple[str, ...] = ()
    inactive: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    head: tuple[str, ...] = ()


def build(model: nn.Module, plan: Blocks) -> Partition:
    """The partition of a plan.

    Raises:
        PlanError: it does not cover the parameters that require grad once each.
    """
    frozen = resolve(model, plan.frozen, "Blocks.frozen")
    always = resolve(model, plan.always_active, "Blocks.always_active")
    if both := set(frozen) & set(always):
        raise PlanError(f"{min(both)!r} is frozen and always active")
    inactive: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    if plan.partition == "layer":
        blocks = partition(model, plan.layers_per_block)
        embed, last = outer_parameters(model)
        head = last.names
        if plan.outer == "blocks":
            blocks = [b for b in (embed, *blocks, last) if b.names]
        elif plan.outer == "attach":
            blocks[0] = Block(blocks[0].label, embed.names + blocks[0].names)
            blocks[-1] = Block(blocks[-1].label, blocks[-1].names + last.names)
        elif plan.outer == "inactive":
            inactive = embed.names + last.names
        else:
            frozen = tuple(dict.fromkeys(frozen + embed.names + last.names))
        out = {*frozen, *always}
        blocks = [Block(b.label, tuple(n for n in b.names if n not in out)) for b in blocks]
        blocks = [b for b in blocks if b.names]
        inactive = tuple(n for n in inactive if n not in out)
    else:
        blocks = from_lists(model, plan.partition)
    frozen = tuple(n for n in frozen if n not in always)
    if not blocks:
        raise PlanError("every block is frozen or always active")
    given = [n for b in blocks for n in b.names] + [*always, *inactive]
    if twice := set(given) & set(frozen) or {n for n in given if given.count(n) > 1}:
        raise PlanError(f"{min(twice)!r} has two places in the partition")
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    if missing := names - {*given, *frozen}:
        raise PlanError(
            f"{len(missing)} parameters are in no block, {min(missing)!r} among them",
            advice="name them in a block, in Blocks.frozen or in Blocks.always_active",
        )
    return Partition(tuple(blocks), always, inactive, frozen, head)


def fingerprint(model_shapes: Mapping[str, Sequence[int]], parts: Partition) -> str:
    """16 hex digits that differ between partitions, names and shapes included."""
    rows = [*(b.names for b in parts.blocks), parts.always, parts.inactive, parts.frozen]
    text = repr([[(n, tuple(model_shapes[n])) for n in row] for row in rows])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


__all__ = ["Block", "Partition", "build", "fingerprint", "from_lists", "layer_lists", "partition"]
