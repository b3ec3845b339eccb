"""A capture by Dynamo, and marked inputs, for the tests of private names."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxmem._compat import graph as _compat
from fxmem._compat.varying import mark_dynamic


def capture(fn: Any, *args: torch.Tensor) -> tuple[fx.GraphModule, list[Any]]:
    """Dynamo's graph of a function, with the example inputs that its backend is given."""
    seen: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any], **_: Any) -> Any:
        seen.append((gm, list(example_inputs)))
        return gm.forward

    torch._dynamo.reset()
    with _compat.capture_config():
        torch.compile(fn, backend=backend, fullgraph=True)(*args)
    return seen[-1]


def marked(*shape: int) -> torch.Tensor:
    tensor = torch.randn(*shape)
    mark_dynamic(tensor)
    return tensor
