"""A captured function in compiled form: preamble, regions in order, outputs.

:func:`compile_graph` is the body of the Dynamo backend. Regions with equal structure share one
:class:`~fxmem.runtime.region_code.RegionCode`, across layers, captures and models.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxmem._compat import graph as _compat
from fxmem._compat.capture_stack import is_stand_in
from fxmem.backends.lowering import Lowering
from fxmem.compiler.borders import Borders
from fxmem.compiler.region_codes import _region_call
from fxmem.compiler.step import CompiledGraph, LateOutput
from fxmem.compiler.together import Together
from fxmem.distributed.sequence import Group
from fxmem.frontend import capture as cap
from fxmem.frontend import parameter_free as pre_
from fxmem.frontend import regions
from fxmem.frontend.dropped_outputs import drop_outputs
from fxmem.frontend.late_outputs import defer_outputs
from fxmem.frontend.stateless_random import drawn_once
from fxmem.passes.causal_convolutions import CausalConvolutions
from fxmem.passes.drop_identities import DropIdentities
from fxmem.passes.first_rows import FirstRows
from fxmem.passes.functionalize import Functionalize
from fxmem.passes.hook_borders import HookBorders
from fxmem.passes.piece_borders import PieceBorders
from fxmem.passes.positional_arguments import PositionalArguments
from fxmem.passes.scalar_inputs import ScalarInputs, fix_numbers
from fxmem.passes.select_log_probs import SelectLogProbs, decide_sizes
from fxmem.passes.select_rows_first import SelectRowsFirst
from fxmem.passes.share_kv_heads import ShareKvHeads
from fxmem.passes.slice_rows_first import SliceRowsFirst
from fxmem.passes.subgraphs import Subgraphs
from fxmem.passes.windows import Windows
from fxmem.plan.plan import Plan, Stream
from fxmem.progress import doing
from fxmem.rewriting.pipeline import Pass, copy_graph, run_passes
from fxmem.roles.roles import RoleSource
from fxmem.runtime.counters import COUNTER
from fxmem.runtime.profile import profile
from fxmem.runtime.region_call import RegionCall
from fxmem.runtime.sharding import current
from fxmem.streaming.chunk_size import Chunker
from fxmem.streaming.exchanges import rows_of
from fxmem.streaming.token_mixing import mixes

GRAPH_PASSES: tuple[Pass[fx.GraphModule], ...] = (
    HookBorders(), Subgraphs(), PieceBorders(), PositionalArguments(), ScalarInputs(),
    Functionalize(), DropIdentities(), CausalConvolutions(), Windows(), FirstRows(),
    ShareKvHeads(), SliceRowsFirst(), SelectRowsFirst(), SelectLogProbs(),
)  # fmt: skip
"""Rewrites of the captured graph, in order."""
LAYER_PASSES: tuple[Pass[fx.GraphModule], ...] = (
    PositionalArguments(), DropIdentities(), ShareKvHeads(),
)  # fmt: skip
"""Those of them that need no more than one layer; they rewrite it before it is repeated."""


def compile_graph(
    plain: fx.GraphModule, example_inputs: Sequence[Any], plan: Plan,
    roles: RoleSource | None = None, *, late: LateOutput | None = None, one: bool = False,
    states: bool = False, learns: bool = True, told: set[str] | None = None,
    group: Group | None = None, last: bool = True,
) -> CompiledGraph:  # fmt: skip
    """Analyse, split and lower a Dynamo graph. Counts in :data:`COUNTER`.

    ``late``: makes what is returned for a wide output that is not computed here, from what its
    region reads and the sizes of the call. ``one``: everything is one region. ``states``: states of
    the model that leave it are wanted. ``learns``: there will be a backward. ``told``:
    operators that a warning has named. ``group``: ranks that stream the sequence together.
    ``last``: what leaves it leaves the call, and is not read by what comes after it.
    """
    start = time.perf_counter()
    doing("cutting the model into regions")
    gm = copy_graph(plain)
    _compat.unify_sizes(gm)
    fix_numbers(gm)
    decide_sizes(gm)
    gm = run_passes(GRAPH_PASSES, gm)
    ambient = _ambient(example_inputs)
    capture = cap.analyse(gm, example_inputs, ambient)
    if plan.stream is not None and plan.stream.logits == "drop" and last:
        drop_outputs(capture, states=states)
    pre = pre_.lower(capture, drawn_once)
    if one:
        parts = [regions.make(capture, pre, capture.main)]
        between: list[list[fx.Node]] = [[], []]
    else:
        parts, between = regions.split(
            capture, pre, mixes, one_length=group is not None,
            owners=None if cap.has_varying_size(plain) else _owners(capture, example_inputs),
        )  # fmt: skip
    if late is not None and last:
        defer_outputs(capture, pre, parts, between, learns=learns)
    borders = Borders(capture, pre, between)
    borders.check(roles is not None)
    lowering = Lowering.of(plan)
    told = set() if told is None else told
    calls: list[RegionCall] = []
    spread: dict[pre_.Leaf, int] = {}
    for i, part in enumerate(parts):
        doing(f"tracing region {i + 1} of {len(parts)}")
        call = _region_call(part, pre, lowering, told, None if group is None else spread)
        joint = call.code.joint
        cuts = [rows_of(joint.info[o].shape) for o in joint.outputs]
        spread.update((leaf, c.dim) for leaf, c in zip(call.outputs, cuts, strict=True) if c)
        calls.append(call)
    COUNTER.captures += 1
    COUNTER.capture_seconds += time.perf_counter() - start
    weights = [
        v for n, v in zip(capture.inputs, example_inputs, strict=True)
        if n in capture.parameters and isinstance(v, Tensor) and not is_stand_in(v)
    ]  # fmt: skip
    chunker = Chunker.of(plan.stream or Stream(), weights, calls, _body_bytes)
    together = None if group is None else Together(group, plan, capture, pre, calls, spread)
    return CompiledGraph(
        capture, pre, calls, plan, chunker, plain, borders, roles, late, one, together
    )


def _body_bytes(code: Any, kind: str, sizes: Mapping[str, int], rows: int) -> int:
    return max(profile(code, kind, sizes, rows).bodies, default=0)


def _owners(capture: cap.Capture, example_inputs: Sequence[Any]) -> Mapping[str, int]:
    """The group of each parameter that FSDP2 has spread."""
    if (sharding := current()) is None:
        return {}
    names = [n.name for n in capture.inputs]
    return sharding.spread(dict(zip(names, example_inputs, strict=True))).owner


def _ambient(example_inputs: Sequence[Any]) -> list[tuple[str, torch.dtype, bool]]:
    devices = {v.device.type for v in example_inputs if isinstance(v, Tensor)}
    return [
        (d, torch.get_autocast_dtype(d), True)
        for d in sorted(devices)
        if torch.is_autocast_enabled(d)
    ]
