"""Functionalise: a write in place on a value made inside the graph becomes a new value.

Everything after this pass may rely on a node's value never changing: what is computed once, where
regions are cut, and what a backward recomputes. A write through a view gives its base a new value;
the other views of that base are taken again where they are read later. What is written to a
buffer, or another tensor that a module holds, is such a value too. It is written back where the
model's own code may look next: before a piece that runs as it is, and at the end. Buffers that
share memory are written back at once, and read again. Writes to parameters and to inputs of the
call are refused, as is one that would make a buffer part of autograd's graph.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxmem._compat import graph as _compat
from fxmem._compat.capture_stack import is_held, is_piece
from fxmem._compat.overrides import DATA
from fxmem.errors import MutationError
from fxmem.frontend import functional_writes as functional
from fxmem.frontend.capture import value_of
from fxmem.frontend.interpret import fake_call
from fxmem.frontend.origin import module_path, source_line
from fxmem.rewriting.pipeline import Required, copy_graph

_OPERATORS: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv, operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod, operator.ipow: operator.pow, operator.iand: operator.and_,
    operator.ior: operator.or_, operator.ixor: operator.xor, operator.imatmul: operator.matmul,
    operator.ilshift: operator.lshift, operator.irshift: operator.rshift,
}  # fmt: skip
_WHOLE = ("fill", "zero", "copy", "uniform", "normal", "bernoulli", "exponential", "random",
          "log_normal", "cauchy", "geometric")  # fmt: skip
"""Writes of everything: the out-of-place method of the name is missing or another one."""
_BOUND = ("resize_", "resize_as_", "set_", "requires_grad_", "swap_", "t_", "transpose_",
          "squeeze_", "unsqueeze_", "detach_", "swapaxes_", "swapdims_", "as_strided_",
          "rename_", "retain_grad_")  # fmt: skip
"""Methods that change what a tensor is, not what it holds."""


@dataclass(frozen=True, slots=True)
class Functionalize(Required):
    """Make the captured graph free of writes in place."""

    name: str = "functionalize"

    def run(self, gm: fx.GraphModule) -> fx.GraphModule:
        if not any(writes(n) for n in gm.graph.nodes):
            return gm
        gm = copy_graph(gm)
        _Rewrite(gm).run()
        gm.graph.lint()
        gm.recompile()
        return gm


def writes(node: fx.Node) -> bool:
    """The call changes its first argument, or an ``out`` argument."""
    if node.op == "call_method":
        return node.target == "__setitem__" or _in_place_name(str(node.target))
    if node.op != "call_function" or _compat.is_control_node(node) is not None:
        return False
    if node.target is operator.setitem or node.target in _OPERATORS:
        return isinstance(node.args[0], fx.Node) and isinstance(value_of(node.args[0]), Tensor)
    if isinstance(node.target, _compat.OpOverload):
        return bool(node.target._schema.is_mutable)
    if isinstance(node.kwargs.get("out"), fx.Node) or _inplace_flag(node):
        return True
    # names such as operator.and_ avoid a keyword of Python
    named = getattr(node.target, "__module__", "") != "_operator"
    return named and _in_place_name(getattr(node.target, "__name__", ""))


def _in_place_name(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _inplace_flag(node: fx.Node) -> bool:
    """``inplace=True``, by name or position."""
    code = getattr(inspect.unwrap(node.target), "__code__", None)
    if "inplace" not in node.kwargs and (
        inspect.isbuiltin(node.target) or (code and "inplace" not in code.co_varnames)
    ):
        return False
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):
        return bool(node.kwargs.get("inplace"))
    return bool(bound.arguments.get("inplace"))


@dataclass(slots=True)
class _Family:
    """Every name of one storage: the node that made it, and its views (view -> taken from).

    ``others``: inputs of the graph that share the storage of ``root``, which is one. ``opaque``:
    some name of it has come from elsewhere, so a write cannot be followed.
    """

    root: fx.Node
    views: dict[fx.Node, fx.Node] = field(default_factory=dict)
    others: list[fx.Node] = field(default_factory=list)
    opaque: bool = False

    @property
    def roots(self) -> list[fx.Node]:
        return [self.root, *self.others]

    def path(self, view: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
        """The root that a name was taken from, and the views between, the root's own first."""
        found = []
        while view in self.views:
            found.append(view)
            view = self.views[view]
        return view, found[::-1]


class _Rewrite:
    """One walk over the graph.

    ``now``: the node that holds the present value of a node; ``stale``: views to be taken again
    when they are read; ``alias``: a write -> what it returns, its target; ``given``: arguments in
    terms of the graph's own nodes, before any was replaced; ``held``: inputs that are written to,
    True where that is still to be written back.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm, self.graph = gm, gm.graph
        self.now: dict[fx.Node, fx.Node] = {}
        self.stale: set[fx.Node] = set()
        self.alias: dict[fx.Node, fx.Node] = {}
        self.given: dict[fx.Node, tuple[Any, Any]] = {}
        self.families: dict[int, _Family] = {}
        self.made: list[fx.Node] = []
        self.held: dict[fx.Node, bool] = {}
        self.grad = True

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if _compat.is_control_node(node) == "grad":
                self.grad = bool(node.args[0])
            self.given[node] = fx.map_arg((node.args, node.kwargs), lambda a: self.alias.get(a, a))
            if self.alias:
                with self.graph.inserting_before(node):
                    self.before(node)
            if writes(node):
                self.write(node)
            else:
                self.join(node)
        for node in reversed(self.alias):
            self.graph.erase_node(node)
        for node in reversed(self.made):
            if not node.users:  # a whole that nobody reads after a write to a view of it
                self.graph.erase_node(node)

    def before(self, node: fx.Node) -> None:
        """What is read by ``node`` is as it is by now."""
        last = node.op == "output"
        for root in [r for r, due in self.held.items() if due and (last or is_piece(node))]:
            self.write_back(node, root, [] if last else [root])
        read = self.given_out if last else self.present
        node.args, node.kwargs = fx.map_arg(self.given[node], read)

    def given_out(self, node: fx.Node) -> fx.Node:
        """A name of what a module holds leaves the call as that."""
        for key in _storages(value_of(node)):
            family = self.families[key]
            root, path = family.path(node)
            if root in self.held:
                args = (root, tuple(self.step(node, v) for v in path))
                return root if not path else self.emit(path[-1], functional.view_of, args)
        return self.present(node)

    def write_back(self, node: fx.Node, root: fx.Node, again: list[fx.Node]) -> None:
        """Before ``node``; ``again``: names of the memory that are read anew from there on."""
        back = self.graph.call_function(
            functional.written_back, (root, self.present(root), tuple(again))
        )
        back.meta = {k: v for k, v in node.meta.items() if k not in ("example_value", "val")}
        self.held[root] = False
        if again:
            self.outdate(self.families[_storages(value_of(root))[0]])

    def outdate(self, family: _Family) -> None:
        self.stale.update(family.views)
        for name in (*family.roots, *family.views):
            self.now.pop(name, None)

    def present(self, node: fx.Node) -> fx.Node:
        """The node that holds the value of ``node`` here; a stale view is taken again."""
        if node in self.stale:
            self.stale.discard(node)
            args, kwargs = fx.map_arg(self.given[node], self.present)
            again = self.graph.create_node(node.op, node.target, args, kwargs)
            again.meta = dict(node.meta)
            self.now[node] = again
            self.made.append(again)
        return self.now.get(node, node)

    def join(self, node: fx.Node) -> None:
        """Note whose storage the node's value shares."""
        for key in _storages(value_of(node)):
            family = self.families.setdefault(key, _Family(node))
            if family.root is node:
                continue
            if node.op == "placeholder":
                family.others.append(node)
                continue
            names = {*family.roots, *family.views}
            source = next((a for a in _nodes(self.given[node]) if a in names), None)
            if source is None:
                family.opaque = True
            elif source is family.root and not isinstance(value_of(source), Tensor):
                family.root = node  # one output of several, each with a storage of its own
            else:
                family.views[node] = source

    def write(self, node: fx.Node) -> None:
        args, kwargs = self.given[node]
        target = kwargs.get("out", args[0] if args else kwargs.get("input"))
        if not isinstance(target, fx.Node):
            raise _refusal(node, "a write to several tensors", "return the results instead")
        family = self.families[_storages(value_of(target))[0]]
        root, path = family.path(target)
        self.check(node, path, root, family)
        with self.graph.inserting_before(node):
            value = whole = self.new_value(node, self.present(target))
            if path:
                whole = self.into_root(node, root, path, value)
            self.outdate(family)
            self.now[root] = whole
            if root.op == "placeholder":
                self.hold(node, root, family)
        if target not in family.roots or not family.others:
            self.stale.discard(target)
            self.now[target] = value
        self.alias[node] = target

    def hold(self, node: fx.Node, root: fx.Node, family: _Family) -> None:
        """``root``, which a module holds, has a new value."""
        if value_of(self.now[root]).requires_grad:
            raise _refusal(
                node, f"in-place write `{_name(node)}` of a value with a gradient to "
                f"`{_compat.input_name(root)}`, which would keep the graph of every step",
                "write a value without one, such as `x.detach()`, or write under torch.no_grad()",
            )  # fmt: skip
        self.held[root] = True
        if family.others:
            self.write_back(node, root, family.roots)

    def check(self, node: fx.Node, path: list[fx.Node], root: fx.Node, family: _Family) -> None:
        if family.opaque or not isinstance(value_of(root), Tensor):
            raise _refusal(node, f"in-place write `{_name(node)}` on a value of many names", None)
        if root.op in ("placeholder", "get_attr") and not all(map(is_held, family.roots)):
            what = (
                "parameter" if isinstance(value_of(root), torch.nn.Parameter) else "input or buffer"
            )
            raise _refusal(
                node, f"in-place write `{_name(node)}` to the {what} `{_compat.input_name(root)}`",
                "write the result to a new tensor and return it, or move the write out of the "
                "compiled function",
            )  # fmt: skip
        if _name(node) in _BOUND:
            raise _refusal(node, f"in-place change `{_name(node)}` of a tensor's metadata", None)
        hidden = any(n.target in ("detach", torch.detach, DATA) for n in path)
        if (not self.grad or hidden) and value_of(root).requires_grad:
            raise _refusal(
                node, f"in-place write `{_name(node)}` behind autograd's back to a value that "
                "wants a gradient", "write to a new tensor instead",
            )  # fmt: skip

    def new_value(self, node: fx.Node, target: fx.Node) -> fx.Node:
        """What the target holds after the write, as a new value of its dtype and shape."""
        value, want = self.plain_form(node, target), value_of(target)
        if value is not None:
            got = value_of(value)
            if got.dtype == want.dtype and got.shape == want.shape:
                return value
            self.graph.erase_node(self.made.pop())
        method = _method(node)
        if method is None:
            raise _refusal(node, f"in-place op `{_name(node)}`", "use the out-of-place form")
        return self.emit(node, functional.written, (target, method, *node.args[1:]), node.kwargs)

    def plain_form(self, node: fx.Node, target: fx.Node) -> fx.Node | None:
        """The out-of-place form of the op, which may promote its result."""
        if node.target in _OPERATORS:
            return self.emit(node, _OPERATORS[node.target], node.args)
        if "out" in node.kwargs:
            given = {k: v for k, v in node.kwargs.items() if k != "out"}
            name = functional.view_name(node.op, node.target)
            args = (target, name, *node.args)
            return None if name is None else self.emit(node, functional.filled, args, given)
        if node.op == "call_function" and _inplace_flag(node):
            return self.emit(node, node.target, *_out_of_place(node))
        method = _name(node).removesuffix("_")
        if node.target is operator.setitem or method in _WHOLE:
            return None
        args = (target, *node.args[1:])
        if hasattr(Tensor, method):
            new = self.graph.call_method(method, args, dict(node.kwargs))
            return self.described(new, node)
        function = getattr(F, method, None)
        return None if function is None else self.emit(node, function, args, node.kwargs)

    def into_root(
        self, node: fx.Node, root: fx.Node, path: list[fx.Node], value: fx.Node
    ) -> fx.Node:
        steps = tuple(self.step(node, v) for v in path)
        return self.emit(node, functional.assigned, (self.present(root), value, steps))

    def step(self, node: fx.Node, view: fx.Node) -> tuple[Any, ...]:
        kind = functional.view_name(view.op, view.target)
        args, kwargs = self.given[view]
        if kind is None or not args or not isinstance(args[0], fx.Node):
            raise _refusal(
                node, f"in-place write `{_name(node)}` through the view `{_name(view)}`",
                "write to the tensor itself, or to a copy of the view",
            )  # fmt: skip
        args, kwargs = fx.map_arg((args[1:], kwargs), self.present)
        return (kind, tuple(args), dict(kwargs))

    def emit(self, like: fx.Node, target: Any, args: Any, kwargs: Any = None) -> fx.Node:
        """A call with the origin of ``like``, its value computed on fake tensors."""
        new = self.graph.call_function(target, tuple(args), dict(kwargs or {}))
        return self.described(new, like)

    def described(self, new: fx.Node, like: fx.Node) -> fx.Node:
        new.meta = {k: v for k, v in like.meta.items() if k not in ("example_value", "val")}
        new.meta["example_value"] = fake_call(new, self.grad)
        self.made.append(new)
        return new


def _out_of_place(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    bound.arguments["inplace"] = False
    return bound.args, bound.kwargs


def _method(node: fx.Node) -> str | None:
    """The Tensor method that does the write."""
    if node.target is operator.setitem:
        return "__setitem__"
    if node.target in _OPERATORS:
        return f"__{node.target.__name__}__"
    name = _name(node)
    return name if hasattr(Tensor, name) else None


def _name(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    if isinstance(node.target, _compat.OpOverload):
        return node.target.overloadpacket.__name__
    return getattr(node.target, "__name__", str(node.target))


def _nodes(given: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(given, found.append)
    return found


def _storages(value: Any) -> list[int]:
    leaves = value if isinstance(value, (tuple, list)) else (value,)
    found = [_compat.storage_key(v) for v in leaves if isinstance(v, Tensor)]
    return list(dict.fromkeys(found))


def _refusal(node: fx.Node, what: str, advice: str | None) -> MutationError:
    return MutationError(
        what, op=_name(node), module=module_path(node), source=source_line(node), advice=advice
    )
