"""One block-epoch, visit by visit: what is active, what moves, and the bytes that are alive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from fxmem.blocks.state import BlockState
from fxmem.roles.roles import Role

PASSES, IDLE = "passes", "idle"


@dataclass(frozen=True, slots=True)
class Region:
    """What is known of a compiled region.

    Attributes:
        names: its parameters.
        saved: bytes of states that it keeps for its backward.
        together: it hands its gradients over after its program, so they are alive together.
    """

    names: frozenset[str]
    saved: int
    together: bool


@dataclass(frozen=True, slots=True)
class Visit:
    """The steps in which one block is active.

    Attributes:
        block: its label.
        first: its first optimizer step, counted from 0; `last` its last one.
        roles: by row of the epoch: ``active``, ``update``, ``low_rank``, ``passes`` (does not
            learn, but hands the gradient on) or ``idle`` (forward only).
        gradient_bytes: gradients in ``.grad`` after the backward.
        update_bytes: most bytes of gradients of inactive weights that are alive together.
        state_bytes: optimizer state after a step of the visit.
        saved_bytes: states that regions keep for their backward; None before a first step.
    """

    block: str
    first: int
    last: int
    roles: dict[str, str]
    gradient_bytes: int
    update_bytes: int
    state_bytes: int
    saved_bytes: int | None

    @property
    def live_bytes(self) -> int:
        """Gradients and optimizer state that can be alive together."""
        return self.gradient_bytes + self.update_bytes + self.state_bytes


@dataclass(slots=True)
class BlockEpoch:
    """The block-epoch that training is in.

    Attributes:
        index: of the epoch, from 0.
        step: optimizer steps done so far.
        rows: blocks in order from the input, with what is outside the blocks.
        visits: one per block, in the order of the schedule.
        all_bytes: gradients and moments of AdamW on everything that may learn, for comparison.
    """

    index: int
    step: int
    rows: tuple[str, ...]
    visits: list[Visit] = field(default_factory=list)
    all_bytes: int = 0

    def draw(self, path: str | Path) -> None:
        """Write a picture (PNG, PDF, SVG by suffix): roles above, live bytes below, per step.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        from fxmem.report.block_epoch_picture import draw

        draw(self, Path(path))

    def __str__(self) -> str:
        head = (
            "steps",
            "active",
            "learn",
            "passes",
            "idle",
            "gradients",
            "updates",
            "state",
            "saved",
        )
        table = [head]
        for v in self.visits:
            kinds = list(v.roles.values())
            learn = len(kinds) - kinds.count(PASSES) - kinds.count(IDLE)
            saved = "-" if v.saved_bytes is None else _mb(v.saved_bytes)
            table.append(
                (f"{v.first}..{v.last}", v.block, str(learn), str(kinds.count(PASSES)),
                 str(kinds.count(IDLE)), _mb(v.gradient_bytes), _mb(v.update_bytes),
                 _mb(v.state_bytes), saved)
            )  # fmt: skip
        widths = [max(len(row[i]) for row in table) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in table]
        return "\n".join([f"block-epoch {self.index}, bytes in MB", *(t.rstrip() for t in lines)])


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f}"


def block_epoch(state: BlockState, model: nn.Module, regions: Sequence[Region] = ()) -> BlockEpoch:
    """The epoch of the next step, from roles and shapes; nothing runs.

    Args:
        state: schedule and roles.
        model: may be on the meta device.
        regions: of the latest call, in order; without them gradients of inactive weights count
            one at a time, and saved states are not known.
    """
    s, parts = state.schedule, state.parts
    weights = dict(model.named_parameters())
    inside = {b.label: b.names for b in state.blocks}
    before = tuple(n for n in parts.inactive if n not in parts.head)
    after = tuple(n for n in parts.inactive if n in parts.head)
    rows = {"embedding": before, **inside, "head": after}
    rows |= {"always active": parts.always, "frozen": parts.frozen}
    rows = {label: names for label, names in rows.items() if names}
    index = s.visit(state.step)[0] // s.count
    learn = [p for n, p in weights.items() if p.requires_grad and n not in parts.frozen]
    out = BlockEpoch(index, state.step, tuple(rows))
    out.all_bytes = sum(p.nbytes + 2 * p.numel() * _wide(p).itemsize for p in learn)
    seen: set[str] = set()
    for k in range(s.count if not index else 2 * s.count):
        visit = (index - 1 if index else 0) * s.count + k
        first = max(0, visit * s.steps - s.compat)
        roles = {state.names[p]: r for p, r in state.roles_at(first).items()}
        seen |= {n for n, r in roles.items() if r is Role.LOW_RANK and n in state.adapters}
        if visit >= index * s.count:
            last = (visit + 1) * s.steps - s.compat - 1
            out.visits.append(_visit(state, weights, rows, regions, roles, seen, first, last))
    return out


def _visit(
    state: BlockState, weights: dict[str, nn.Parameter], rows: dict[str, tuple[str, ...]],
    regions: Sequence[Region], roles: dict[str, Role], seen: set[str], first: int, last: int,
) -> Visit:  # fmt: skip
    active = [n for n, r in roles.items() if r is Role.ACTIVE]
    updates = {n: weights[n].nbytes for n, r in roles.items() if r is Role.UPDATE}
    low_rank = [n for n, r in roles.items() if r is Role.LOW_RANK and n in state.adapters]
    terms = {n: (state.adapters[n].up, state.adapters[n].down) for n in state.adapters}
    gradients = [weights[n] for n in active] + [t for n in low_rank for t in terms[n]]
    kept = [weights[n] for n in active] + [t for n in seen for t in terms[n]]
    groups = [r.names for r in regions if r.together]
    update = max(updates.values(), default=0)
    update = max([update, *(sum(updates.get(n, 0) for n in g) for g in groups)])
    learned = {*active, *updates, *low_rank}
    saved = None
    if regions:
        starts = [i for i, r in enumerate(regions) if r.names & learned]
        saved = sum(r.saved for r in regions[starts[0] :]) if starts else 0
    return Visit(
        block=state.blocks[state.schedule.block(first)].label,
        first=first, last=last,
        roles=_rows(rows, roles, set(state.adapters)),
        gradient_bytes=sum(p.nbytes for p in gradients),
        update_bytes=update,
        # a weight in float32 or wider is its own master
        state_bytes=sum(
            p.numel() * _wide(p).itemsize * (2 + (p.dtype is not _wide(p))) for p in kept
        ),
        saved_bytes=saved,
    )  # fmt: skip


def _rows(
    rows: dict[str, tuple[str, ...]], roles: dict[str, Role], adapters: set[str]
) -> dict[str, str]:
    out, learned = {}, False
    for label, names in rows.items():
        kinds = {roles[n] for n in names if n in roles}
        if Role.ACTIVE in kinds:
            out[label] = "active"
        elif Role.UPDATE in kinds:
            out[label] = "update"
        elif any(roles.get(n) is Role.LOW_RANK and n in adapters for n in names):
            out[label] = "low_rank"
        else:
            # rows come in the order of their use; what is shallower than all that learns is idle
            out[label] = PASSES if learned and label != "frozen" else IDLE
        learned = learned or out[label] not in (PASSES, IDLE)
    return out


def _wide(p: torch.Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


__all__ = ["BlockEpoch", "Region", "Visit", "block_epoch"]
