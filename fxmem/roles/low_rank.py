"""Code of a region with adapters: the same region, with ``up`` and ``down`` as further inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from fxmem.frontend.low_rank_terms import AdaptedRegion, LowRank
from fxmem.roles.roles import Adapter
from fxmem.runtime.region_code import RegionCode

Make = Callable[..., RegionCode]


def adapted(code: RegionCode, adapters: Mapping[int, Adapter], make: Make) -> RegionCode:
    """``code`` with adapters at input positions; traced once per distinct set of ranks and scales.

    ``make(region, caller, name)`` builds a region's code.
    """
    shape = tuple(
        (i, tuple(a.up.shape), tuple(a.down.shape), a.up.dtype, a.scale)
        for i, a in sorted(adapters.items())
    )
    key = ("adapted", shape)
    if key not in code.derived:
        region = code.region
        values = [v for _, a in sorted(adapters.items()) for v in (a.up, a.down)]
        with region.capture.fake_mode:
            fakes = [
                torch.empty(v.shape, dtype=v.dtype, device=v.device, requires_grad=True)
                for v in values
            ]
        scales = {i: a.scale for i, a in sorted(adapters.items())}
        wide = AdaptedRegion.of(region, fakes, list(scales))
        code.derived[key] = make(wide, lambda: LowRank(wide, scales), f"{code.name}_low_rank")
    found: RegionCode = code.derived[key]
    return found
