"""One region of a capture: its code, where its tensors come from, where its results go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import sympy

from fxmem.axes.sizes import Size, T
from fxmem.frontend import parameter_free as pre_
from fxmem.runtime.region_code import RegionCode


@dataclass(slots=True)
class RegionCall:
    """One region of a capture: its code, where its tensors come from, and where its outputs go."""

    code: RegionCode
    leaves: list[pre_.Leaf]
    outputs: list[pre_.Leaf]
    release: list[pre_.Leaf] = field(default_factory=list)
    modules: str = ""
    calls: dict[tuple[str, int], bool] = field(default_factory=dict)
    """See :attr:`fxmem.frontend.regions.Region.calls`."""
    shared: dict[int, tuple[pre_.Leaf, bool]] = field(default_factory=dict)
    sole: list[bool] = field(default_factory=list)
    """Which outputs have one reader, a later region."""
    length: sympy.Symbol = T
    """What the capture calls the length that streams here; the two change their names."""

    def sizes(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Those of a call under the names that the region's code has for them."""
        own = dict(sizes)
        if self.length != T:
            own["T"], own[str(self.length)] = own[str(self.length)], own["T"]
        return own

    def named(self, size: Size) -> Size:
        """A size of the region's code under the names of the capture."""
        return size.xreplace({T: self.length, self.length: T})

    @property
    def movable(self) -> list[bool]:
        """Which of its tensors another region made, so that nobody else needs them on the device
        between its forward and its backward."""
        return [leaf[0] == "main" for leaf in self.leaves]
