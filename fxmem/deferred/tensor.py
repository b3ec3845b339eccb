"""A tensor without values that remembers what is done with it, until something small is wanted."""

from __future__ import annotations

import contextlib
import operator
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fxmem._compat import graph as _compat
from fxmem._compat.overrides import edge, plainly, tree_leaves, tree_map, unchanged, version
from fxmem.deferred.source import constant_like
from fxmem.deferred.tape import Node, Unknown, probe, record, sources
from fxmem.errors import ModifiedParameterError, MutationError

_VALUES = frozenset((
    "item", "tolist", "numpy", "backward", "register_hook", "retain_grad", "requires_grad_",
    "register_post_accumulate_grad_hook", "data_ptr", "untyped_storage", "storage", "is_set_to",
    "share_memory_", "pin_memory", "record_stream", "resize_", "set_", "grad", "vjp",
    "__bool__", "__float__", "__int__", "__index__", "__complex__", "__array__", "__contains__",
    "__deepcopy__", "__reduce_ex__", "__dlpack__", "__format__", "__set__", "__reversed__",
))  # fmt: skip
"""Calls that a tensor without values would answer, and wrongly."""
_HANDLES: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_WAYS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


class Deferred(Tensor):
    """Calls on it are recorded; what cannot be recorded gets the values.

    Any function of torch that takes one comes by ``__torch_function__``. What does not (a function
    of C++, a ``torch.autograd.Function``) works on the values, and its gradient comes back by the
    edge that the tensor has in autograd's graph.
    """

    _node: Node
    _edge: Any = None
    """What of autograd's graph we gave it; where it has another, a function of somebody else's has
    returned it."""
    _way: _Way | None = None
    """Of an :class:`_Edge`; None where the values are known, or nothing learns."""

    @classmethod
    @torch.compiler.disable
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _called(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch types it as an instance method
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def values(x: Any) -> Any:
            return _values(x, str(func)) if isinstance(x, cls) else x

        given, named = tree_map(values, (args, kwargs or {}))
        return func(*given, **named)


@dataclass(eq=False, slots=True, weakref_slot=True)
class _Way:
    """How a gradient gets from a deferred tensor to ``sources``, which it is made of.

    ``apart``: the values, made of copies of the sources. No pass through them gets to what lies
    before a source, where another source (the weight of a head that is the embedding) may be.
    """

    sources: tuple[Tensor, ...]
    node: Node | None
    apart: tuple[Tensor, Mapping[int, Tensor]] | None = None

    def values(self, name: str) -> tuple[Tensor, Mapping[int, Tensor]]:
        if self.apart is None:
            assert self.node is not None
            self.apart = _recorder(self.node).apart(self.node, name)
            self.node = None  # whose other values may have a gradient that goes this way
        return self.apart


class _Edge(torch.autograd.Function):
    """Where a gradient arrives that autograd has for a deferred tensor itself."""

    @staticmethod
    def forward(ctx: Any, tensor: Deferred, way: _Way, *sources: Tensor) -> Tensor:
        ctx.way, ctx.recorder = way, _recorder(tensor._node)
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        sources = ctx.way.sources
        if gradient is None:
            return None, None, *(None for _ in sources)
        ctx.recorder.begin_backward()
        real, copies = ctx.way.values("backward")
        with torch.enable_grad():
            found = torch.autograd.grad(
                real, [copies.get(id(s), s) for s in sources], gradient, allow_unused=True,
                retain_graph=True,
            )  # fmt: skip
        return None, None, *found


class _Known(torch.autograd.Function):
    """A gradient of a deferred tensor goes to its values."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, real: Tensor) -> Tensor:
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return None, gradient


class _Values(torch.autograd.Function):
    """Values of a tensor that somebody else's function has; their gradient goes where that of the
    tensor goes.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return gradient, None


def _wrapper(node: Node) -> Deferred:
    fake = node.fake
    made: Deferred = _compat.wrapper_tensor(Deferred, fake.shape, fake.dtype, fake.device)
    made._node = node
    return made


def handle(node: Node) -> Tensor:
    """The tensor that stands for a node."""
    made = _wrapper(node)
    if node.fake.requires_grad:
        _lead(made, _Way(sources(node), node))
    _HANDLES[node.order] = made
    return made


def _recorder(node: Node) -> Any:
    """Of the model whose outputs it depends on: of a student rather than of its teacher."""
    return next((h for h in node.heads if h.learns), next(iter(node.heads))).recorder


def alive() -> list[Node]:
    """Nodes of the tensors that the program still has."""
    return [x._node for x in list(_HANDLES.values())]


def settle(learning: bool = True) -> None:
    """Compute what is small and still there; without ``learning``, of calls without gradients
    alone.

    Done before weights change and before the next batch: a metric may be read later, and what is
    kept from batch to batch shall be the metric, and not the states that it is made of.
    """
    for node in alive():
        # with roles a value that wants a gradient is part of a step
        roles = node.fake.requires_grad and any(h.recorder.roles for h in node.heads)
        open_ = node.real is None and node.heads and not node.wide and not roles
        if open_ and (learning or not any(h.learns for h in node.heads)):
            with contextlib.suppress(ModifiedParameterError):  # nobody has asked yet
                _whole([node], "a metric")


def _before_step(*_: Any) -> None:
    settle()


register_optimizer_step_pre_hook(_before_step)


def _node_of(x: Deferred) -> Node:
    own = edge(x)
    if own is not None and own is not x._edge:
        (value,) = (
            _whole([x._node], own.name()) if x._way is None else x._way.values(own.name())[:1]
        )
        node, x._edge = x._node, own
        x._node = Node("", None, (), {}, node.context, node.fake, node.memory, node.rows)
        _learned(x, value)
    return x._node


def _values(x: Deferred, name: str) -> Tensor:
    """For a function that has the edge of ``x``, by which the gradient will come."""
    node = _node_of(x)
    if x._way is not None:
        _learned(x, x._way.values(name)[0])
    return _whole([node], name)[0].detach()


def _learned(x: Deferred, value: Tensor) -> None:
    with plainly(), torch.enable_grad():
        x._node.know(_Values.apply(x, value.detach()))
    x._way = None


def _whole(nodes: list[Node], name: str) -> list[Tensor]:
    """Values of nodes that a call of ``name`` wants."""
    with _redirected(name) if any(n.real is None for n in nodes) else contextlib.nullcontext():
        if missing := [n for n in nodes if n.real is None]:
            _recorder(missing[0]).give(missing, alive(), name)
    return [n.real for n in nodes]


def with_values(given: Any, name: str) -> Any:
    """``given`` to ``name``, a call that is not recorded: with the values of deferred tensors."""
    if not any(isinstance(x, Deferred) for x in tree_leaves(given)):
        return given
    return tree_map(
        lambda x: _whole([_node_of(x)], name)[0] if isinstance(x, Deferred) else x, given
    )


@contextlib.contextmanager
def _redirected(name: str) -> Iterator[None]:
    """Inside, values become known. From then on gradients go by these, not past them."""
    learn = [x for x in list(_HANDLES.values()) if x._way is not None and edge(x) is x._edge]
    learn.sort(key=lambda x: x._node.order)
    ways = [weakref.ref(x._way) for x in learn]
    try:
        for x in learn:
            _let_go(x)
        for way in list(_WAYS.values()):  # by an edge that a function of somebody else's has
            way.values(name)
        for x, held in zip(learn, ways, strict=True):
            if (kept := held()) is not None:
                _lead(x, kept)
                _learned(x, kept.values(name)[0])
        yield
    finally:
        for x in learn:
            if x._edge is None and x._node.real is None:
                _lead(x, _Way(sources(x._node), x._node))
            elif x._edge is None:
                _point(x, _Known, x._node.real)


def _lead(x: Deferred, way: _Way) -> None:
    x._way = _WAYS[x._node.order] = way
    _point(x, _Edge, way, *way.sources)


def _point(x: Deferred, function: Any, *given: Any) -> None:
    """Where a gradient of ``x`` goes. Its values stay, so this is no write."""
    with plainly(), torch.enable_grad(), unchanged(x):
        function.apply(x, *given)
    x._edge = edge(x)


def _let_go(x: Deferred) -> None:
    with plainly():
        x.detach_()
    x._edge = x._way = None


@torch.compiler.disable  # a compiled function breaks here, and goes on behind
def _called(func: Any, args: Any, kwargs: Any) -> Any:
    if not torch.is_inference_mode_enabled():
        return _answer(func, args, kwargs)
    with torch.inference_mode(False), torch.no_grad():  # where writes are counted
        return _answer(func, args, kwargs)


def _answer(func: Any, args: Any, kwargs: Any) -> Any:
    name = getattr(func, "__name__", str(func))
    if name == "__getitem__" and (rows := _masked(*args)) is not None:
        return args[0].flatten(0, args[1].dim() - 1).index_select(0, rows)
    handles = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Deferred)]
    own = tree_map(lambda x: _node_of(x) if isinstance(x, Deferred) else x, (args, kwargs))
    nodes = [n for n in tree_leaves(own) if isinstance(n, Node)]
    attribute = getattr(getattr(func, "__self__", None), "__name__", "")
    if name == "__get__" and attribute == "grad_fn" and nodes[0].real is None:
        return edge(handles[0])
    if name == "__repr__" and nodes[0].real is None and nodes[0].wide:
        return f"Deferred(shape={tuple(nodes[0].fake.shape)}, dtype={nodes[0].fake.dtype})"
    if name == "__iter__":
        return iter(_called(torch.unbind, (args[0], 0), {}))
    if len({n.heads for n in nodes if n.real is None}) > 1:
        for n in nodes:
            if not n.wide:
                _whole([n], name)  # each with its own output
    if all(n.real is not None for n in nodes) or name in _VALUES or "repr" in name:
        return _run(func, own, nodes, name)
    own = tree_map(lambda n: n.real if isinstance(n, Node) and n.real is not None else n, own)
    try:
        form, target, given = _spelled(func, name, own[0])
        constant_like((given, own[1]))
        result, written = probe(func, *own)
    except Unknown:
        return _run(func, own, nodes, name)
    if any(n.memory.given for n in written):
        raise _aliased(name)
    return _recorded(form, target, given, own[1], result, written, handles)


def _masked(tensor: Any, index: Any) -> Tensor | None:
    """The numbers of the rows that a mask picks: of so many that the result has a size."""
    mask = isinstance(index, Tensor) and index.dtype == torch.bool and index.dim() > 0
    if not mask or isinstance(index, Deferred) or not isinstance(tensor, Deferred):
        return None
    fits = index.dim() < tensor.dim() and index.shape == tensor.shape[: index.dim()]
    return index.flatten().nonzero().squeeze(1) if fits else None


def _run(func: Any, own: Any, nodes: list[Node], name: str) -> Any:
    """The call on values."""
    _whole(nodes, name)
    before = [version(n.real) for n in nodes]
    args, kwargs = tree_map(lambda n: n.real if isinstance(n, Node) else n, own)
    result = func(*args, **kwargs)
    for n, known in zip(nodes, before, strict=True):
        if version(n.real) != known and any(
            other.memory is n.memory and other.real is None for other in alive()
        ):
            raise _aliased(name)
    return result


def _aliased(name: str) -> MutationError:
    return MutationError(
        "a write in place to a tensor made of the logits, of which another view has been read",
        op=name, advice='write to a copy, or ask for plain logits with Stream(logits="keep")',
    )  # fmt: skip


def _recorded(
    form: str, target: Any, args: Any, kwargs: Any, result: Any, written: list[Node],
    handles: list[Deferred],
) -> Any:  # fmt: skip
    """What a call returns: for each tensor of it one that stands for it."""
    items = [v for v in tree_leaves(result) if isinstance(v, Tensor)]
    if not items and not written:
        return result
    known = {id(x._node.fake): x for x in handles}
    made = record(form, target, args, kwargs, items[0] if items else written[0].fake, written)
    if not isinstance(result, (tuple, list)):
        same = known.get(id(result))
        return result if not items else handle(made) if same is None else same
    parts = [handle(record("function", operator.getitem, (made, i), {}, v, []))
             for i, v in enumerate(result)]  # fmt: skip
    return parts if isinstance(result, list) else _like(result, parts)


def _like(result: Any, items: list[Any]) -> Any:
    """A tuple of the same kind."""
    kind = type(result)
    return kind(*items) if hasattr(kind, "_fields") else kind(items)


def _spelled(func: Any, name: str, args: Any) -> tuple[str, Any, Any]:
    """How a call is written: form, target, arguments."""
    if name == "__get__":
        found = func.__self__.__name__
        return ("method", "detach", args[:1]) if found == "data" else ("attribute", found, args[:1])
    bare = name.strip("_")
    if name.startswith("__r") and (op := getattr(operator, f"__{bare[1:]}__", None)):
        return "function", op, args[::-1]
    if name.startswith("__") and (op := getattr(operator, name, None)):
        return "function", op, args
    if getattr(Tensor, name, None) is func:
        return "method", name, args
    if not callable(func) or not getattr(func, "__module__", None):
        raise Unknown(f"{name} is no function")
    return "function", func, args
