"""Parts of a captured graph that one node calls: a function with a gradient of its own, and a span
under a function transform.

A node of either kind has the object itself as its target. Under the trace of a region the call
runs the captured bodies op by op, so the joint graph holds plain ATen ops: the forward's, and for
the gradient those of the user's own backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxmem._compat import graph as _compat
from fxmem.frontend.capture import Context, contexts_of
from fxmem.frontend.interpret import call_node, run

Call = Callable[[fx.Node, Any, Any], Any]


@dataclass(frozen=True, slots=True, eq=False)
class Body:
    """A captured graph as a function of its placeholders."""

    gm: fx.GraphModule
    contexts: Mapping[fx.Node, Context]
    nodes: Sequence[fx.Node]
    inputs: Sequence[fx.Node]
    result: Any

    @classmethod
    def of(cls, gm: fx.GraphModule) -> Body:
        contexts, nodes = contexts_of(gm)
        inputs = list(gm.graph.find_nodes(op="placeholder"))
        (output,) = gm.graph.find_nodes(op="output")
        return cls(gm, contexts, [n for n in nodes if n not in inputs], inputs, output.args[0])

    def __call__(self, args: Sequence[Any], call: Call) -> Any:
        env: dict[fx.Node, Any] = dict(zip(self.inputs, args, strict=True))
        run(self.nodes, env, self, call)
        return fx.map_arg(self.result, lambda n: env[n])


class Subgraph:
    """What a node calls that holds ``bodies``; ``options`` is what else tells two of them apart."""

    bodies: tuple[Body, ...]
    options: str = ""

    def __init__(self) -> None:
        self.__name__ = self.__qualname__ = type(self).__name__

    def apply(self, args: Sequence[Any], call: Call) -> Any:
        """The result; ``call`` runs the nodes of the bodies."""
        raise NotImplementedError

    def __call__(self, *args: Any) -> Any:
        return self.apply(args, call_node)

    @property
    def own_gradient(self) -> bool:
        """The gradient is the user's and need not be linear in the gradient that comes in."""
        return any(has_own_gradient(b.nodes) for b in self.bodies)


def has_own_gradient(nodes: Sequence[fx.Node]) -> bool:
    """Some of these nodes call a function with a backward of its own."""
    return any(isinstance(n.target, Subgraph) and n.target.own_gradient for n in nodes)


class Span(Subgraph):
    """Ops under ``vmap`` or another function transform, from where it begins to where it ends."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.bodies = (body,)

    def apply(self, args: Sequence[Any], call: Call) -> Any:
        # the canonical ops know nothing of function transforms
        return self.bodies[0](args, call_node)


class CustomFunction(Subgraph):
    """A ``torch.autograd.Function``: ``forward(*args) -> (outputs, saved)`` and ``backward(*grads,
    *saved) -> gradients of args``. ``fixed``: outputs that are not differentiable.
    """

    own_gradient = True

    def __init__(self, forward: Body, backward: Body, fixed: Sequence[int]) -> None:
        super().__init__()
        self.bodies = (forward, backward)
        self.fixed = tuple(fixed)
        self.options = str(self.fixed)

    def apply(self, args: Sequence[Any], call: Call) -> Any:
        return _Function.apply(self, call, *args)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: CustomFunction, call: Call, *args: Any) -> Any:
        outputs, ctx.saved = function.bodies[0](args, call)
        ctx.function, ctx.call = function, call
        ctx.mark_non_differentiable(*(outputs[i] for i in function.fixed))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        # autocast ends with the forward; what the backward itself switches on is in its graph
        with _compat.no_autocast():
            given = (*grads, *ctx.saved)
            return (None, None, *ctx.function.bodies[1](given, ctx.call))
