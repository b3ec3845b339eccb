"""Whole parameters and their reductions in the ledger of a step: what FSDP2 does with its groups.

A group is gathered into one buffer and copied from there. In a forward the buffer waits for the
next gather; in a backward the next group's is made ahead. Gradients of a group are copied into one
buffer, which waits for the next reduction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxmem.frontend.parameter_free import Leaf
from fxmem.memory.ledger import Ledger
from fxmem.runtime.region_call import RegionCall
from fxmem.streaming.shards import Shards

GATHERED = ("whole", "gathered", "reduced")
"""First parts of the names of storages that hold whole parameters, or whole gradients to reduce."""


class Groups:
    """The groups of a step whose regions are ``calls``."""

    def __init__(self, shards: Shards, calls: Sequence[RegionCall], book: Ledger) -> None:
        self.shards, self.book = shards, book
        self.uses: list[list[int]] = []
        self.first: dict[int, int] = {}
        self.last: dict[int, int] = {}
        self.used: set[Leaf] = set()
        """Parameters whose gradients go once they are reduced."""
        for i, call in enumerate(calls):
            groups = [self._owner(leaf) for leaf in call.leaves]
            self.uses.append(list(dict.fromkeys(g for g in groups if g)))
            for group in self.uses[-1]:
                self.first.setdefault(group, i)
                self.last[group] = i
        self._order = sorted(self.first, key=self.first.__getitem__)
        self._open: set[int] = set()
        self._gathered: int | None = None
        self._reduced: int | None = None

    def _owner(self, leaf: Leaf) -> int | None:
        return self.shards.owner.get(leaf[1]) if leaf[0] == "input" else None

    def begin(self) -> None:
        """The root is whole from here on."""
        if self.shards.owner:
            self._gather(0)

    def _gather(self, group: int, wait: bool = True) -> None:
        """``wait``: the buffer stays until the next gather."""
        if self._gathered != group:
            self.book.hold(("gathered", group), self.shards.sizes[group])
            if self._gathered is not None:
                self.book.release(("gathered", self._gathered))
            self._gathered = group
        self.book.hold(("whole", group), self.shards.sizes[group])
        self._open.add(group)
        self.book.mark("gathered")
        if not wait:
            self._let_go()

    def _let_go(self) -> None:
        if self._gathered is not None:
            self.book.release(("gathered", self._gathered))
            self._gathered = None

    def _close(self, group: int) -> None:
        if group in self._open:
            self._open.remove(group)
            self.book.release(("whole", group))

    def enter(self, index: int) -> None:
        """Before a region's forward."""
        for group in self.uses[index]:
            if group not in self._open:
                self._gather(group)

    def leave(self, index: int) -> None:
        """After it."""
        for group in self.uses[index]:
            if self.last[group] == index and group not in self.shards.stays:
                self._close(group)

    def end_forward(self) -> None:
        """No gather follows."""
        self._let_go()

    def enter_backward(self, index: int) -> None:
        """Before a region's backward: the group before its own is on its way as well."""
        for group in reversed(self.uses[index]):
            if group not in self._open:
                self._gather(group, wait=False)
                at = self._order.index(group)
                if at:
                    self._gathered = self._order[at - 1]
                    self.book.hold(("gathered", self._gathered), self.shards.sizes[self._gathered])

    def reduce(self, index: int, gradients: dict[Leaf, Any]) -> None:
        """After it: what no earlier region adds to is closed, and this rank's part is left."""
        for group in reversed(self.uses[index]):
            if self.first[group] == index:
                self._reduce(group, gradients)

    def end(self, gradients: dict[Leaf, Any]) -> None:
        """After the backward."""
        if self.shards.owner:
            self._reduce(0, gradients)
        self._let_go()
        if self._reduced is not None:
            self.book.release(("reduced", self._reduced))

    def _reduce(self, group: int, gradients: dict[Leaf, Any]) -> None:
        self._close(group)
        if self._reduced is not None:
            self.book.release(("reduced", self._reduced))
        mine = [leaf for leaf in gradients if self._owner(leaf) == group]
        sizes = {leaf: self.book.sizes[gradients[leaf]] for leaf in mine}
        self.book.hold(("reduced", group), sum(sizes.values()))
        self.book.mark("reduction")
        self._reduced = group
        for leaf, size in sizes.items():
            self.book.hold(("shard", leaf), self.shards.share(leaf[1], size))
            self.book.release(gradients[leaf])
            gradients[leaf] = "shard", leaf
        self.book.mark("reduced")
        for leaf in self.used & sizes.keys():
            self.book.release(gradients.pop(leaf))
