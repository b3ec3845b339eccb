"""A tensor without values that remembers what is done with it, until something small is wanted."""

from __future__ import annotations

import contextlib
import operator
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fxmem._compat import graph as _compat
from fxmem._compat.overrides import edge, plainly, tree_leaves, tree_map, version
from fxmem.deferred.source import constant_like
from fxmem.deferred.tape import Node, Unknown, probe, record
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


class Deferred(Tensor):
    """Calls on it are recorded; what cannot be recorded gets the values.

    Any function of torch that takes one comes by ``__torch_function__``. What does not (a function
    of C++, a ``torch.autograd.Function``) works on the values, and its gradient comes back by the
    edge that the tensor has in autograd's graph.
    """

    _node: Node

    @classmethod
    @torch.compiler.disable
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _called(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch types it as an instance method
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def values(x: Any) -> Any:
            return _whole([_node_of(x)], str(func))[0].detach() if isinstance(x, cls) else x

        given, named = tree_map(values, (args, kwargs or {}))
        return func(*given, **named)


class _Edge(torch.autograd.Function):
    """Where a gradient arrives that autograd has for a deferred tensor itself; it goes on to what
    the tensor is made of.
    """

    @staticmethod
    def forward(ctx: Any, node: Node, *sources: Tensor) -> Tensor:
        ctx.node, ctx.sources = node, sources
        return _wrapper(node)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        (real,) = _whole([ctx.node], "backward")
        with torch.enable_grad():
            found = torch.autograd.grad(
                real, ctx.sources, gradient, allow_unused=True, retain_graph=True
            )
        return None, *found


class _Values(torch.autograd.Function):
    """The values of a tensor that somebody else's function has returned; its gradient is theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return gradient, None


def _wrapper(node: Node) -> Tensor:
    fake = node.fake
    made: Deferred = _compat.wrapper_tensor(Deferred, fake.shape, fake.dtype, fake.device)
    made._node = node
    return made


def handle(node: Node) -> Tensor:
    """The tensor that stands for a node."""
    with plainly(), torch.enable_grad():
        learns = node.fake.requires_grad
        made: Tensor = _Edge.apply(node, *node.sources) if learns else _wrapper(node)
    _HANDLES[node.order] = made
    return made


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
    if own is not None and getattr(own, "node", None) is not x._node:
        (value,) = _whole([x._node], own.name())
        node = x._node
        x._node = Node("", None, (), {}, node.context, node.fake, node.memory, node.rows)
        with plainly():
            x._node.real = _Values.apply(x, value.detach())
    return x._node


def _whole(nodes: list[Node], name: str) -> list[Tensor]:
    """Values of nodes that a call of ``name`` wants."""
    missing = [n for n in nodes if n.real is None]
    if missing:
        heads = missing[0].heads  # of a student and of its teacher, say
        head = next((h for h in heads if h.learns), next(iter(heads)))
        head.recorder.give(missing, alive(), name)
    return [n.real for n in nodes]


@torch.compiler.disable  # a compiled function breaks here, and goes on behind
def _called(func: Any, args: Any, kwargs: Any) -> Any:
    if not torch.is_inference_mode_enabled():
        return _answer(func, args, kwargs)
    with torch.inference_mode(False), torch.no_grad():  # where writes are counted
        return _answer(func, args, kwargs)


def _answer(func: Any, args: Any, kwargs: Any) -> Any:
    name = getattr(func, "__name__", str(func))
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
