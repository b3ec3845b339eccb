"""How parameters are spread over ranks that gather them for the time of a region."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Shards:
    """How much of the parameters is where, for what predicts memory.

    Attributes:
        ranks: that each have a part of every parameter.
        owner: the group of each parameter, by the name of the graph's input. Group 0 is whole from
            the beginning of a step to its end, any other one around the regions that use it.
        sizes: bytes of each group's whole parameters.
        stays: groups that are still whole between their last use in a forward and the backward.
    """

    ranks: int = 1
    owner: Mapping[str, int] = field(default_factory=dict)
    sizes: tuple[int, ...] = (0,)
    stays: frozenset[int] = frozenset()

    def share(self, name: str, size: int) -> int:
        """Bytes of this rank's part of a gradient of ``size`` bytes, by its parameter."""
        return -(-size // self.ranks) if name in self.owner else size

    def resident(self, weights: int) -> int:
        """Of so many bytes of parameters, what is there in the middle of a step."""
        spread = sum(self.sizes)
        others = [size for i, size in enumerate(self.sizes) if i and i not in self.stays]
        open_ = spread - sum(others) + sum(sorted(others)[-2:])
        return weights - spread + -(-spread // self.ranks) + open_


WHOLE = Shards()
"""Every rank has all parameters."""
