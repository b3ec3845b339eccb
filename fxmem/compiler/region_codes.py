"""One compiled form per distinct region, shared by equal ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from fxmem.backends.lowering import Lowering
from fxmem.frontend import parameter_free as pre_
from fxmem.frontend import regions
from fxmem.frontend.canonicalize import Canonicalize
from fxmem.frontend.joint import Caller, Joint
from fxmem.passes.free_factories import FreeFactories
from fxmem.passes.global_mean import GlobalMean
from fxmem.passes.indexed_sums import IndexedSums
from fxmem.passes.running_sums import RunningSums
from fxmem.passes.scatter_into_sums import ScatterIntoSums
from fxmem.passes.shifts import Shifts
from fxmem.passes.simplify import Simplify
from fxmem.rewriting.pipeline import Pass, run_passes
from fxmem.roles.low_rank import adapted
from fxmem.roles.roles import Adapter
from fxmem.rules import revision
from fxmem.runtime.code_library import CodeLibrary
from fxmem.runtime.counters import COUNTER
from fxmem.runtime.loops import execute
from fxmem.runtime.region_call import RegionCall
from fxmem.runtime.region_code import RegionCode
from fxmem.runtime.saved_code import Saved
from fxmem.streaming.chunk_forms import HANDLERS

_CODES = CodeLibrary()


JOINT_PASSES: tuple[Pass[Joint], ...] = (
    FreeFactories(), GlobalMean(), Simplify(), ScatterIntoSums(), IndexedSums(), Shifts(),
    RunningSums(),
)  # fmt: skip
"""Rewrites of every traced region, in order."""


def _region_call(
    region: regions.Region, pre: pre_.Preamble, lowering: Lowering, told: set[str],
    spread: Collection[pre_.Leaf] | None = None,
) -> RegionCall:  # fmt: skip
    """``spread``: values of which ranks have rows; None: there are no other ranks."""
    own = None if spread is None else tuple(leaf in spread for leaf in region.leaves)

    def make(name: str, saved: Saved | None) -> RegionCode:
        return RegionCode(
            region, Canonicalize, _joint_passes, HANDLERS, execute, COUNTER, name, lowering, told,
            own=own, saved=saved,
        )  # fmt: skip

    rows = revision()  # rows of the user's are of this process
    alone = own is None and not rows and lowering.tells_nothing(region.values)
    code = _CODES.take(f"{rows} {lowering} {own}", region, make, shared=alone)
    outputs: list[pre_.Leaf] = [("main", n.name) for n in region.outputs]
    length = region.capture.length
    return RegionCall(
        code, region.leaves, outputs, modules=region.modules, calls=region.calls, length=length
    )


def save_codes() -> None:
    """Write what the calls so far have made, for the next process."""
    _CODES.save()


def _adapted(code: RegionCode, adapters: Mapping[int, Adapter]) -> RegionCode:
    def make(region: regions.Region, caller: Callable[[], Caller], name: str) -> RegionCode:
        return RegionCode(
            region,
            caller,
            _joint_passes,
            HANDLERS,
            execute,
            COUNTER,
            name,
            code.lowering,
            code.told,
        )

    return adapted(code, adapters, make)


def _joint_passes(joint: Joint) -> Joint:
    return run_passes(JOINT_PASSES, joint)
