"""Checks between passes: what must hold of a graph whatever a pass did to it.

:class:`Verifier` remembers the graph a pass was given; :meth:`Verifier.check` compares. Nodes that
the pass did not touch are not evaluated again, so the checks are always on.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx

from fxmem.errors import FxmemError
from fxmem.joint import Joint

Program: TypeAlias = fx.GraphModule | Joint


class VerifyError(FxmemError):
    """A pass left a graph that is not well formed; a fault of the pass, not of the model."""

    default_advice = "this is a fault of fxmem: please report it with the model's configuration"


@dataclass(frozen=True, slots=True)
class Verifier:
    """``before``: the nodes of the graph the pass was given, as text, in order."""

    program: Program
    before: tuple[str, ...]

    @classmethod
    def of(cls, program: Program) -> Verifier:
        return cls(program, _text(program.graph))

    def check(self, name: str, result: Program) -> None:
        """Raise :class:`VerifyError` where pass ``name`` broke a rule."""
        if _text(self.program.graph) != self.before:
            raise VerifyError(f"pass {name} changed its input")
        try:
            result.graph.lint()
        except RuntimeError as e:
            raise VerifyError(f"pass {name} left a malformed graph: {e}") from e
        if _signature(self.program) != _signature(result):
            raise VerifyError(f"pass {name} changed the signature")
        known = set(self.before)
        touched: set[fx.Node] = set()
        for node in result.graph.nodes:
            if node.op not in ("call_function", "call_method"):
                continue
            moved = any(a in touched for a in node.all_input_nodes)
            if moved or _line(node) not in known:
                touched.add(node)
                _true_value(name, node)


def _line(node: fx.Node) -> str:
    return (
        f"{node.name} {node.op} {node.target} {node.args} {node.kwargs} {_describe(_value(node))}"
    )


def _text(graph: fx.Graph) -> tuple[str, ...]:
    return tuple(_line(n) for n in graph.nodes)


def _signature(program: Program) -> tuple[Any, ...]:
    nodes = list(program.graph.nodes)
    inputs = [(n.target, _describe(_value(n))) for n in nodes if n.op == "placeholder"]
    outputs = nodes[-1].args[0]
    flat = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    described = [_describe(_value(o)) if isinstance(o, fx.Node) else o for o in flat]
    return (inputs, described)


def _value(node: fx.Node) -> Any:
    return node.meta.get("val", node.meta.get("example_value"))


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_describe(v) for v in value)})"
    return str(value)


def _true_value(name: str, node: fx.Node) -> None:
    """The recorded value has the dtype, shape and device that the op gives."""
    recorded = _value(node)
    what = f"pass {name}: the recorded value of {node.name}"
    if recorded is None:
        raise VerifyError(f"{what} is missing", op=str(node.target))
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), _value)
    mode = getattr(recorded, "fake_mode", None) or contextlib.nullcontext()
    with mode, torch.no_grad():
        if node.op == "call_method":
            actual = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            assert callable(node.target)
            actual = node.target(*args, **kwargs)
    if _describe(actual) != _describe(recorded):
        raise VerifyError(
            f"{what} is {_describe(recorded)}, the op gives {_describe(actual)}",
            op=str(node.target),
        )
