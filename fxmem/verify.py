"""Checks between passes: what must hold of a graph whatever a pass did to it.

:class:`Verifier` remembers the graph a pass was given; :meth:`Verifier.check` compares. Nodes that
the pass did not touch are not evaluated again, so the checks are always on.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx

from fxmem._compat import is_control_node
from fxmem.axes import TensorInfo
from fxmem.capture import Context, contexts_of
from fxmem.errors import VerificationError
from fxmem.joint import Joint, info_of
from fxmem.sizes import same

Program: TypeAlias = fx.GraphModule | Joint


@dataclass(frozen=True, slots=True)
class Verifier:
    """``before``: the nodes of the graph the pass was given, as text, in order."""

    program: Program
    before: tuple[str, ...]

    @classmethod
    def of(cls, program: Program) -> Verifier:
        return cls(program, _text(program.graph))

    def check(self, name: str, result: Program, *, full: bool = False) -> None:
        """Raise :class:`VerificationError` where pass ``name`` broke a rule.

        ``full``: evaluate every node again, touched or not.
        """
        if _text(self.program.graph) != self.before:
            raise VerificationError(f"pass {name} changed its input")
        try:
            result.graph.lint()
        except RuntimeError as e:
            raise VerificationError(f"pass {name} left a malformed graph: {e}") from e
        if not _agree(_signature(self.program), _signature(result)):
            raise VerificationError(f"pass {name} changed the signature")
        if isinstance(result, Joint):
            _check_joint(name, result)
        contexts = contexts_of(result)[0] if isinstance(result, fx.GraphModule) else {}
        known = set(self.before)
        touched: set[fx.Node] = set()
        for node in result.graph.nodes:
            if node.op not in ("call_function", "call_method") or is_control_node(node):
                continue
            moved = any(a in touched for a in node.all_input_nodes)
            if full or moved or _line(node) not in known:
                touched.add(node)
                with contexts.get(node, Context()).enter():
                    _true_value(name, node)


def _line(node: fx.Node) -> str:
    return (
        f"{node.name} {node.op} {node.target} {node.args} {node.kwargs} {_describe(_value(node))}"
    )


def _text(graph: fx.Graph) -> tuple[str, ...]:
    return tuple(_line(n) for n in graph.nodes)


def _signature(program: Program) -> tuple[Any, ...]:
    nodes = list(program.graph.nodes)
    inputs = [(n.target, _value(n)) for n in nodes if n.op == "placeholder"]
    outputs = nodes[-1].args[0]
    flat = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return (inputs, [_value(o) if isinstance(o, fx.Node) else o for o in flat])


def _agree(a: Any, b: Any) -> bool:
    """Equal values of the recorded kind: tensors by dtype, device and sizes as expressions."""
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_agree(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return (a.dtype, a.device) == (b.dtype, b.device) and _agree(list(a.shape), list(b.shape))
    if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt):
        return isinstance(b, (int, torch.SymInt)) and same(_expression(a), _expression(b))
    return type(a) is type(b) and str(a) == str(b)


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _check_joint(name: str, joint: Joint) -> None:
    """The lists that give a joint graph its meaning are those of its graph."""

    def broken(what: str) -> VerificationError:
        return VerificationError(f"pass {name}: {what} of the joint graph are not its graph's")

    nodes = list(joint.graph.nodes)
    given = [*joint.ints, *joint.inputs, joint.seed, *(t for t in joint.tangents if t is not None)]
    if given != [n for n in nodes if n.op == "placeholder"]:
        raise broken("the inputs")
    results = list(nodes[-1].args[0])
    count = len(joint.outputs)
    if results[:count] != joint.outputs:
        raise broken("the outputs")
    if [g for g in results[count:] if g is not None] != [g for g in joint.grads if g is not None]:
        raise broken("the gradients")
    for node in nodes:
        if node.op == "output":
            continue
        want, got = info_of(_value(node), joint.symbols), joint.info.get(node)
        if not _same_info(want, got):
            raise VerificationError(
                f"pass {name}: {node.name} is noted as {got}, its value is {want}",
                op=str(node.target),
            )


def _same_info(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_same_info(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, TensorInfo) and isinstance(b, TensorInfo):
        return (
            a.dtype == b.dtype
            and a.rank == b.rank
            and all(same(x, y) for x, y in zip(a.shape, b.shape, strict=True))
        )
    return a is None and b is None


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
        raise VerificationError(f"{what} is missing", op=str(node.target))
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), _value)
    mode = getattr(recorded, "fake_mode", None) or contextlib.nullcontext()
    with mode, torch.no_grad():
        if node.op == "call_method":
            actual = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            assert callable(node.target)
            actual = node.target(*args, **kwargs)
    if not _agree(actual, recorded):
        raise VerificationError(
            f"{what} is {_describe(recorded)}, the op gives {_describe(actual)}",
            op=str(node.target),
        )
