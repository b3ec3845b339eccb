"""Wide outputs that leave a capture as a promise: the head is not run, but handed out.

Logits that nothing inside the call turns into a loss would leave it whole, a vocabulary wide. What
the last region makes of the last hidden state is cut off instead, so that it can run chunk by chunk
together with what the caller does with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from fxmem._compat import graph as _compat
from fxmem.axes.sizes import degree, per_token
from fxmem.frontend.capture import Capture, canonical_shape, is_border, is_size, is_tensor, value_of
from fxmem.frontend.dropped_outputs import KEEP_PER_TOKEN
from fxmem.frontend.functional_writes import is_of_held
from fxmem.frontend.interpret import fake_call
from fxmem.frontend.parameter_free import Preamble
from fxmem.frontend.regions import Region, make
from fxmem.frontend.subgraph import Subgraph


@dataclass(frozen=True, slots=True)
class Late:
    """An output that ``region`` would make; it has one output and is not run."""

    region: Region

    @property
    def value(self) -> Tensor:
        """Its metadata, with symbolic sizes."""
        found: Tensor = value_of(self.region.outputs[0])
        return found


class Random(Exception):
    """The op draws random numbers."""


class Watch(_compat.TorchDispatchMode):
    """Raises where random numbers are drawn: a second run of the same op would draw others."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _compat.is_random(func):
            raise Random(str(func))
        return func(*args, **(kwargs or {}))


def defer_outputs(
    capture: Capture, pre: Preamble, parts: list[Region], between: list[list[fx.Node]], *,
    learns: bool = True,
) -> None:  # fmt: skip
    """Take heads off the last of the regions ``parts``; ``capture.outputs`` has a :class:`Late` in
    the place of what they make. ``learns``: of those with a gradient alone.
    """
    if len(parts) < 2 or not all(map(is_of_held, between[-1])):
        return
    last = parts[-1]
    found = {
        o: cut for o in capture.outputs
        if isinstance(o, fx.Node) and o in last.outputs and is_tensor(o)
        and (value_of(o).requires_grad or not learns) and (cut := _head(capture, pre, last, o))
    }  # fmt: skip
    capture.outputs = [
        Late(found[o]) if isinstance(o, fx.Node) and o in found else o for o in capture.outputs
    ]
    others = [o for o in last.outputs if o not in found]
    if not found:
        return
    parts.pop()
    if others:
        parts.append(make(last.capture, pre, _cone(last.nodes, others)))
    else:
        between[-2:] = [[*between[-2], *between[-1]]]


def _head(capture: Capture, pre: Preamble, last: Region, output: fx.Node) -> Region | None:
    """The region that makes a wide output alone, from less than the output is; None where it is
    not of that kind, or has what only a compiled region can run.
    """
    shape = capture.shape(output)
    width = per_token(shape)
    if degree(shape) == 0 and len(shape) > 2 and shape[-2] != 1:
        width = per_token(shape[-1:])  # as many rows as the call asked for, not as its length has
    elif degree(shape) != 1:
        return None
    if width <= KEEP_PER_TOKEN:
        return None
    region = replace(make(capture, pre, _cone(last.nodes, [output])), outputs=[output])
    read = [canonical_shape(v, capture.symbols) for v in region.values]
    states = sum(per_token(s) for s in read if degree(s) == 1)
    plain = not region.cones and all(map(_is_plain, region.nodes))
    return region if plain and 0 < states < width else None


def _cone(nodes: Sequence[fx.Node], roots: Sequence[fx.Node]) -> list[fx.Node]:
    """Those of ``nodes`` that ``roots`` need."""
    needed = set(roots)
    for n in reversed(nodes):
        if n in needed:
            needed.update(n.all_input_nodes)
    return [n for n in nodes if n in needed]


def _is_plain(node: fx.Node) -> bool:
    """A call that may run anywhere and any number of times."""
    if is_size(value_of(node)):
        return True
    known = node.op in ("call_function", "call_method")
    if not known or isinstance(node.target, Subgraph) or is_border(node):
        return False
    try:
        with Watch():
            fake_call(node, False)
    except Random:
        return False
    return True


__all__ = ["Late", "Random", "Watch", "defer_outputs"]
