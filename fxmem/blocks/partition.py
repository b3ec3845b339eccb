"""Blocks of parameters by module structure, never by name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from fxmem.errors import PlanError


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
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    blocks = []
    for path, layers in layer_lists(model):
        for start in range(0, len(layers), layers_per_block):
            stop = min(start + layers_per_block, len(layers))
            paths = tuple(f"{path}.{i}." for i in range(start, stop))
            inside = tuple(n for n, _ in model.named_parameters() if n.startswith(paths))
            own = tuple(n for n in inside if n in names)
            if own:
                blocks.append(Block(f"{path}.{start}", own))
    if not blocks:
        raise PlanError("no layers that can train were found", advice="give the blocks as lists")
    return blocks


def from_lists(model: nn.Module, lists: Sequence[Sequence[str]]) -> list[Block]:
    """Blocks from lists of names of parameters or modules.

    Raises:
        PlanError: no block, an empty block, an unknown name, a frozen parameter, or a parameter in
            two blocks.
    """
    # every name of a tied weight stands for its first one
    first = {id(p): n for n, p in model.named_parameters()}
    every = list(model.named_parameters(remove_duplicate=False))
    blocks: list[Block] = []
    owner: dict[str, int] = {}
    for index, entries in enumerate(lists):
        found: dict[str, None] = {}
        for entry in entries:
            hit = [p for n, p in every if n == entry or n.startswith(f"{entry}.")]
            if not hit:
                raise PlanError(f"block {index} names {entry!r}, which the model does not have")
            if frozen := [first[id(p)] for p in hit if not p.requires_grad]:
                raise PlanError(f"block {index} holds {frozen[0]!r}, which does not require grad")
            found.update(dict.fromkeys(first[id(p)] for p in hit))
        if not found:
            raise PlanError(f"block {index} is empty")
        for name in found:
            if owner.setdefault(name, index) != index:
                raise PlanError(f"{name!r} is in blocks {owner[name]} and {index}")
        blocks.append(Block(f"block {index}", tuple(found)))
    if not blocks:
        raise PlanError("the partition is empty", advice="give at least one block")
    return blocks


def fingerprint(blocks: Sequence[Block]) -> str:
    """16 hex digits that differ between partitions."""
    text = "\n".join(" ".join(block.names) for block in blocks)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
