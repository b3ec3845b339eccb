"""Checks between passes: what must hold of a graph whatever a pass did to it.

:class:`Verifier` remembers what a pass was given; :meth:`Verifier.check` compares. Nodes that
the pass did not touch are not evaluated again, so the checks are always on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import fx

from fxmem._compat.data_sizes import by_data, evaluating
from fxmem._compat.graph import is_control_node
from fxmem.axes.signature import TensorInfo
from fxmem.axes.sizes import same
from fxmem.errors import VerificationError
from fxmem.frontend.capture import Context, contexts_of
from fxmem.frontend.interpret import attribute
from fxmem.frontend.joint import Joint, info_of
from fxmem.program.steps import Program
from fxmem.rewriting.text import Subject, describe, line, lines, value
from fxmem.rewriting.verify_code import check_code, graphs


@dataclass(frozen=True)
class Verifier:
    """What a pass was given; ``calls``: its calls then, in order."""

    subject: Subject
    calls: list[Any]

    @classmethod
    def of(cls, subject: Subject) -> Verifier:
        return cls(subject, _calls(subject))

    @cached_property
    def text(self) -> list[str]:
        """Its nodes, in order, as long as it is what it was."""
        return lines(self.subject)

    def check(self, name: str, after: Verifier, *, full: bool = False) -> None:
        """Raise :class:`VerificationError` where pass ``name``, which made ``after``, broke a rule.

        ``full``: evaluate every node again, touched or not.
        """
        result = after.subject
        if _calls(self.subject) != self.calls:
            raise VerificationError(f"pass {name} changed its input")
        if result is self.subject and not full:
            return
        for graph in graphs(result):
            try:
                graph.lint()
            except RuntimeError as e:
                raise VerificationError(f"pass {name} left a malformed graph: {e}") from e
        if isinstance(result, (fx.Graph, Program)):
            check_code(name, self.subject, result)
            return
        assert isinstance(self.subject, (fx.GraphModule, Joint))
        if not _agree(_signature(self.subject), _signature(result)):
            raise VerificationError(f"pass {name} changed the signature")
        if isinstance(result, Joint):
            _check_joint(name, result)
        self._check_values(name, result, full)

    def _check_values(self, name: str, result: fx.GraphModule | Joint, full: bool) -> None:
        assert isinstance(self.subject, (fx.GraphModule, Joint))
        contexts = contexts_of(result)[0] if isinstance(result, fx.GraphModule) else {}
        known = set(self.text)
        before = {n.name: value(n) for n in self.subject.graph.nodes}
        touched: set[fx.Node] = set()
        seen: set[Any] = set()
        for node in result.graph.nodes:
            if node.op not in ("call_function", "call_method") or is_control_node(node):
                continue
            moved = any(a in touched for a in node.all_input_nodes)
            if full or moved or line(node) not in known:
                context = contexts.get(node, Context())
                if (same := (_evaluated(node), context)) not in seen:
                    with context.enter():
                        _true_value(name, node, result)
                seen.add(same)
                if not _alike(before.get(node.name), value(node)):
                    touched.add(node)


def _evaluated(node: fx.Node) -> Any:
    """Equal for calls that give the same value: layers that shared a trace share their values."""
    given = fx.map_arg(
        (node.args, dict(node.kwargs)),
        lambda a: str(a) if value(a) is None else str(id(value(a))),
    )
    return node.op, node.target, repr(given), id(value(node))


def _alike(old: Any, new: Any) -> bool:
    """What reads the value under its name may take the one for the other."""
    if isinstance(old, (tuple, list)) and isinstance(new, (tuple, list)):
        return len(old) == len(new) and all(map(_alike, old, new))
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) and old is not new:
        return _agree(old, new) and _agree(list(old.stride()), list(new.stride()))
    return old is not None and _agree(old, new)


def _calls(subject: Subject) -> list[Any]:
    """Every call and what it takes, without the recorded values, whose sizes a guard of the check
    before may have fixed.
    """
    if isinstance(subject, Program):
        return [one.rpartition("): ")[0] or one for one in lines(subject)]
    graph = subject if isinstance(subject, fx.Graph) else subject.graph
    return [(n, n.target, n.args, n.kwargs) for n in graph.nodes]


def _signature(program: fx.GraphModule | Joint) -> tuple[Any, ...]:
    nodes = list(program.graph.nodes)
    inputs = [(n.target, value(n)) for n in nodes if n.op == "placeholder"]
    outputs = nodes[-1].args[0]
    flat = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return (inputs, [value(o) if isinstance(o, fx.Node) else o for o in flat])


def _agree(a: Any, b: Any) -> bool:
    """Equal values of the recorded kind: tensors by dtype, device and sizes as expressions."""
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_agree(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return (a.dtype, a.device) == (b.dtype, b.device) and _agree(list(a.shape), list(b.shape))
    if by_data(a) and by_data(b):
        return True  # it has a new name each time
    if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt):
        return isinstance(b, (int, torch.SymInt)) and _same_size(a, b)
    nameless = (
        getattr(type(a), "__repr__", None) is object.__repr__
    )  # says where it lies, not what it is
    return type(a) is type(b) and (nameless or str(a) == str(b))


def _same_size(a: Any, b: Any) -> bool:
    """Equal as expressions; what is no polynomial (a minimum, whole blocks of a length) also under
    what the capture is guarded by.
    """
    one, other = _expression(a), _expression(b)
    plain = one.is_polynomial() and other.is_polynomial()
    return same(one, other) or (not plain and bool(a == b))


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
        want, got = info_of(value(node), joint.symbols), joint.info.get(node)
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


def _true_value(name: str, node: fx.Node, program: fx.GraphModule | Joint) -> None:
    """The recorded value has the dtype, shape and device that the op gives."""
    recorded = value(node)
    what = f"pass {name}: the recorded value of {node.name}"
    if recorded is None and not node.users:
        return  # a call for its effect, such as a write
    if recorded is None:
        raise VerificationError(f"{what} is missing", op=str(node.target))
    module = program if isinstance(program, fx.GraphModule) else program.module
    mode = getattr(recorded, "fake_mode", None)

    def given(a: fx.Node) -> Any:
        if a.op != "get_attr" or value(a) is not None:
            return value(a)
        # bodies of higher-order ops and what those hold have no value of their own
        held = attribute(module, str(a.target))
        if isinstance(held, torch.Tensor) and mode is not None:
            return mode.from_tensor(held)
        return held

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), given)
    with evaluating(mode), torch.no_grad():
        if node.op == "call_method":
            actual = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            assert callable(node.target)
            actual = node.target(*args, **kwargs)
    if not _agree(actual, recorded):
        raise VerificationError(
            f"{what} is {describe(recorded)}, the op gives {describe(actual)}",
            op=str(node.target),
        )
