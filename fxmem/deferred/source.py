"""Recorded calls as the source of a function.

Equal recordings give equal text, whatever their lengths: a number that is a size of an input is
written as that size. So the text is the key of the compiled function.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxmem._compat.overrides import tree_leaves
from fxmem.caches import Cache
from fxmem.deferred.tape import Node, Unknown
from fxmem.frontend.capture import Context
from fxmem.frontend.origin import Line, name_of, stands_for

_ARITHMETIC = frozenset(
    f"{i}{name}{end}" for name in ("add", "sub", "mul", "div", "truediv", "true_divide")
    for i in ("", "i") for end in ("", "_")
) | {"lt", "le", "gt", "ge", "eq", "ne"}  # fmt: skip
_CONSTANTS: Cache[tuple[str, Any], tuple[str, Any]] = Cache("constants in recordings", 4096)
_NUMBER = itertools.count()
SMALLEST = 8
"""Smaller numbers are dimensions and counts rather than lengths."""


@dataclass(slots=True)
class Source:
    """``text`` defines ``program(*inputs)``, which returns the values asked for; it has a mark in
    the place of each of ``numbers``, which come with the dtype of what they are added to.
    """

    text: str
    inputs: list[Tensor]
    calls: list[str]
    numbers: list[tuple[float, torch.dtype]]
    lines: dict[int, Line]
    """What made the calls, by line of the text."""

    def fixed(self, but: Collection[int]) -> Source:
        """With the numbers as constants, but for some, which become inputs."""
        text, inputs = self.text, list(self.inputs)
        for i, (number, dtype) in enumerate(self.numbers):
            if i in but:
                inputs.append(torch.tensor(number, dtype=dtype))
            text = text.replace(_mark(i), f"n{i}" if i in but else repr(number))
        names = "".join(f", n{i}" for i in sorted(but))
        return Source(text.replace("):", f"{names}):", 1), inputs, self.calls, [], self.lines)

    def function(self) -> Any:
        space = {"torch": torch, **dict(_CONSTANTS.values())}
        file = f"<recorded {next(_NUMBER)}>"
        stands_for(file, self.lines)
        exec(compile(self.text, file, "exec"), space)
        return space["program"]


@dataclass(slots=True)
class _Writer:
    inputs: dict[int, Tensor] = field(default_factory=dict)
    names: dict[Node, str] = field(default_factory=dict)
    sizes: dict[int, str] = field(default_factory=dict)
    numbers: list[tuple[float, torch.dtype]] = field(default_factory=list)

    def tensor(self, value: Tensor) -> str:
        self.inputs.setdefault(id(value), value)
        return f"x{list(self.inputs).index(id(value))}"

    def value(self, v: Any) -> str:
        if isinstance(v, Node):
            return self.names[v] if v.real is None else self.tensor(v.real)
        if isinstance(v, Tensor):
            return self.tensor(v)
        if isinstance(v, (tuple, list)):
            inside = "".join(f"{self.value(i)}, " for i in v)
            return f"({inside})" if isinstance(v, tuple) else f"[{inside}]"
        if isinstance(v, dict):
            return "{" + ", ".join(f"{k!r}: {self.value(i)}" for k, i in v.items()) + "}"
        if isinstance(v, slice):
            return f"slice({self.value(v.start)}, {self.value(v.stop)}, {self.value(v.step)})"
        if isinstance(v, int) and not isinstance(v, bool):
            return self.sizes.get(v) or (f"-{self.sizes[-v]}" if -v in self.sizes else repr(int(v)))
        plain = v is None or v is Ellipsis or isinstance(v, (bool, str))
        if plain or (isinstance(v, float) and math.isfinite(v)):
            return repr(v)
        return constant(v)

    def operands(self, node: Node) -> list[str]:
        """Arguments by position; a number in arithmetic may be another one at the next step."""
        name = name_of(node.target)
        values = [v.fake if isinstance(v, Node) else v for v in node.args]
        dtypes = list({v.dtype for v in values if isinstance(v, Tensor)})
        exact = dtypes in ([torch.float32], [torch.float64])  # narrower numbers would be rounded
        free = exact and name in _ARITHMETIC
        found = []
        for v in node.args:
            if free and isinstance(v, (int, float)) and not isinstance(v, bool):
                found.append(_mark(len(self.numbers)))
                self.numbers.append((v, dtypes[0]))
            else:
                found.append(self.value(v))
        return found

    def call(self, node: Node) -> str:
        args = self.operands(node)
        named = [f"{k}={self.value(v)}" for k, v in node.kwargs.items()]
        if node.form == "attribute":
            return f"{args[0]}.{node.target}"
        if node.form == "method":
            return f"{args[0]}.{node.target}({', '.join([*args[1:], *named])})"
        return f"{constant(node.target)}({', '.join([*args, *named])})"

    def learn_sizes(self, nodes: Sequence[Node]) -> None:
        """Numbers that are a size, or one beside it, of an input that varies, and not of a weight;
        then what one length leaves of another: of a sequence, where its answer begins; then how
        many rows the caller has asked for.
        """
        operands = (v.real if isinstance(v, Node) else v for n in nodes for v in n.operands())
        found = list(dict.fromkeys(v for v in operands if isinstance(v, Tensor)))
        fixed = {d for v in found if isinstance(v, nn.Parameter) for d in v.shape}
        varying = [v for v in found if not isinstance(v, nn.Parameter)]
        for v in varying:
            name = self.tensor(v)
            for i, size in enumerate(v.shape):
                self._learn(size, f"{name}.shape[{i}]", fixed)
        for v in [v for v in varying if v.dim() > 2][:1]:
            batch, length = v.shape[:2]
            b, t = (f"{self.tensor(v)}.shape[{i}]" for i in range(2))
            for number, text in ((length, t), (length - 1, f"({t} - 1)")):
                self._learn(batch * number, f"({b} * {text})", fixed, near=False)
            for other in [w for w in varying if w.dim() > 1 and w.shape[1] < length]:
                text = f"({t} - {self.tensor(other)}.shape[1])"
                self._learn(length - other.shape[1], text, fixed)
        for rows in dict.fromkeys(n.fake.shape[-2] for n in nodes if _takes_rows(n)):
            if rows >= SMALLEST and rows not in fixed and rows not in self.sizes:
                counted = torch.empty(rows, 0)  # its size is all that it has
                self._learn(rows, f"{self.tensor(counted)}.shape[0]", fixed)

    def _learn(self, size: int, name: str, fixed: set[int], near: bool = True) -> None:
        beside = ((size - 1, f"({name} - 1)"), (size + 1, f"({name} + 1)"))
        for number, text in ((size, name), *beside[: 2 * near]):
            if number >= SMALLEST and number not in fixed:
                self.sizes.setdefault(number, text)


def _takes_rows(node: Node) -> bool:
    """It is an output of the model, or some rows of it."""
    below = [o for o in node.operands() if isinstance(o, Node)]
    ends = node.target in ("__getitem__", operator.getitem) or not any(o.heads for o in below)
    return bool(ends and node.heads and node.wide and node.fake.dim() > 1)


def constant(value: Any) -> str:
    """A name for an object that programs use, the same for the same object.

    Raises:
        Unknown: it is no constant.
    """
    simple = (torch.dtype, torch.device, torch.memory_format, torch.layout, float)
    if not callable(value) and not isinstance(value, simple):
        raise Unknown(f"an argument is a {type(value).__name__}")
    key = (type(value).__name__, str(value) if isinstance(value, float) else value)
    if key not in _CONSTANTS:
        known = str(getattr(value, "__name__", type(value).__name__))
        name = f"{known if known.isidentifier() else 'c'}_{next(_NUMBER)}"
        _CONSTANTS[key] = name, value
    return _CONSTANTS[key][0]


def source(nodes: Sequence[Node], wanted: Sequence[Node]) -> Source:
    """The function that makes ``wanted`` by the calls ``nodes``."""
    writer = _Writer()
    writer.learn_sizes(nodes)
    lines: list[str] = []
    calls: list[str] = []
    made: dict[int, Line] = {}
    for context, group in itertools.groupby(nodes, key=lambda n: n.context):
        lines.append(f"    with {_entered(context)}:")
        for node in group:
            writer.names[node] = f"v{len(writer.names)}"
            if node.line is not None:
                made[len(lines) + 2] = node.line  # below the line that names the function
            if node.target is operator.setitem:
                base, index, new = map(writer.value, node.args)
                lines.append(f"        {base}[{index}] = {new}")
            else:
                lines.append(f"        {writer.names[node]} = {writer.call(node)}")
            calls.append(name_of(node.target))
    result = "".join(f"{writer.value(n)}, " for n in wanted)
    names = ", ".join(f"x{i}" for i in range(len(writer.inputs)))
    text = "\n".join([f"def program({names}):", *lines, f"    return ({result})"])
    return Source(text, list(writer.inputs.values()), calls, writer.numbers, made)


def _mark(i: int) -> str:
    return f"<{i}>"


def _entered(context: Context) -> str:
    casts = [
        f"torch.autocast({d!r}, dtype={constant(t)}, enabled={on}, cache_enabled=False)"
        for d, t, on in context.autocast
    ]
    return ", ".join([f"torch.set_grad_enabled({context.grad})", *casts])


def constant_like(values: Any) -> None:
    """
    Raises:
        Unknown: an argument is nothing that a program can be given.
    """
    for v in tree_leaves(values):
        parts = (v.start, v.stop, v.step) if isinstance(v, slice) else (v,)
        for part in parts:
            if not isinstance(part, (Node, Tensor, int, float, str, type(None), type(...))):
                constant(part)
