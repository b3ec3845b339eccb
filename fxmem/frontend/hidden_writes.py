"""Traces without writes: what an operator writes inside itself is found, and refused by name.

A call such as a batch norm in training, or an embedding with ``max_norm``, looks like a function of
values but changes a buffer or a parameter. A streamed region would run it once per chunk and again
in the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxmem._compat import graph as _compat
from fxmem._compat import tracing
from fxmem.errors import MutationError, UnsupportedOpError
from fxmem.frontend.origin import module_path, source_line


def without_writes(gm: fx.GraphModule, mode: Any) -> fx.GraphModule:
    """``gm``, a trace of ATen ops under ``mode``, with writes to its own values made functional.

    Raises:
        MutationError: an operator writes to an input of the trace.
        UnsupportedOpError: an operator makes a sparse tensor.
    """
    out = tracing.functional(gm, mode)
    if any(_compat.is_mutable(n) and n.args[0].op == "placeholder" for n in out.graph.nodes):
        source = next(n for n in gm.graph.nodes if _compat.is_mutable(n))
        raise MutationError(
            f"`{source.target}` writes to a parameter, a buffer or an input of the call",
            op=str(source.target), module=module_path(source), source=source_line(source),
            advice="call .eval() on a norm with running statistics or use one without them, and "
            "leave max_norm out of an embedding",
        )  # fmt: skip
    for node in out.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.layout is not torch.strided:
            # an op of the backward has no line; the call that asked for it has
            asked = next((n for n in gm.graph.nodes if _wants_sparse(n)), node)
            raise UnsupportedOpError(
                f"`{node.target}` makes a sparse tensor", op=str(asked.target),
                module=module_path(asked), source=source_line(asked),
                advice="ask for dense gradients (leave out sparse=True and sparse_grad=True)",
            )  # fmt: skip
    return out


def _wants_sparse(node: fx.Node) -> bool:
    if not isinstance(node.target, _compat.OpOverload):
        return False
    given = _compat.named_arguments(node.target, node.args, node.kwargs)
    return any(given.get(name) is True for name in ("sparse", "sparse_grad"))
