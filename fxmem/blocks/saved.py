"""What a saved run holds of the block state, and what it must agree on to go on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxmem.blocks import adapters as low_rank
from fxmem.blocks.partition import fingerprint
from fxmem.blocks.state import BlockState
from fxmem.errors import BlockStateError


def state_dict(state: BlockState) -> dict[str, Any]:
    """Position and identity of the schedule, and the low-rank terms."""
    s = state.schedule
    visit, inside = s.visit(state.step)
    return {
        "global_step": state.step, "visit": visit, "steps_in_visit": inside,
        "permutation": s.permutation(visit // s.count),
        "partition": fingerprint(state.shapes, state.parts),
        "schedule": [s.count, s.steps, s.order, s.seed, s.start, s.compat],
        "update": [type(state.plan.inactive).__name__, state.plan.reach],
        "last_norm": state.clip.last_norm,
        "adapters": low_rank.values(state.adapters),
    }  # fmt: skip


def check(state: BlockState, saved: Mapping[str, Any]) -> None:
    """Refuse a saved state of another partition, schedule or update.

    Raises:
        BlockStateError: names what differs, saved and present.
    """
    here = state_dict(state)
    wrong = [
        f"{name}: saved {saved.get(name)!r}, present {here[name]!r}"
        for name in ("partition", "schedule", "update")
        if saved.get(name) != here[name]
    ]
    if wrong:
        raise BlockStateError("; ".join(wrong), advice="resume with the plan of the saved run")
    low_rank.check(state.adapters, saved["adapters"])


def load(state: BlockState, saved: Mapping[str, Any]) -> None:
    """Take over a checked state."""
    state.begin(int(saved["global_step"]))
    state.clip.last_norm = saved["last_norm"]
    low_rank.load(state.adapters, saved["adapters"])


__all__ = ["check", "load", "state_dict"]
