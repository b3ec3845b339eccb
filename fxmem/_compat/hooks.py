"""The private names of torch that hooks need; see :mod:`fxmem._compat.graph`."""

from __future__ import annotations

import contextlib
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import fx
from torch._dynamo import compiled_autograd
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental._backward_state import BackwardState
from torch.utils.hooks import BackwardHook

__all__ = [
    "accumulates_in_this_pass", "function", "gradient_hooks", "has_hooks", "has_old_hooks",
    "is_hook", "is_hook_state", "lazy_module", "own_hooks_uncaptured", "saved_elsewhere",
    "unguarded", "watched", "without_asking", "without_hooks",
]  # fmt: skip


def function(gm: fx.GraphModule) -> Callable[..., Any]:
    """``gm`` as a function: hooks that a user set on all modules do not see it."""
    _LazyGraphModule.force_recompile(gm)
    return gm.forward


def lazy_module(root: torch.nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A graph with what it holds; its Python text is written where it runs, not at every change."""
    return _LazyGraphModule(root, graph)


_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def unguarded(module: torch.nn.Module) -> Hashable:
    """What a capture of ``module`` depends on and Dynamo does not compare at the next call: whether
    there are hooks on all modules, which modules inside have some, and the forwards of classes.
    """
    m = torch.nn.modules.module
    kinds = (m._global_forward_pre_hooks, m._global_forward_hooks, m._global_backward_pre_hooks,
             m._global_backward_hooks)  # fmt: skip
    inside = list(module.modules())
    forwards = {
        (c, f := c.forward, getattr(f, "__code__", None)) for c in {type(m) for m in inside}
    }
    hooked = [(i, kind) for i, one in enumerate(inside) for kind in _KINDS if getattr(one, kind)]
    return tuple(bool(hooks) for hooks in kinds), tuple(hooked), frozenset(forwards)


def has_old_hooks(module: torch.nn.Module) -> bool:
    """Whether ``register_backward_hook`` was used, which watches whatever op came last."""
    return any(m._is_full_backward_hook is False and m._backward_hooks for m in module.modules())


def has_hooks(module: torch.nn.Module) -> bool:
    """Something is called with the calls of a module inside ``module``, or their gradients."""
    return any(getattr(m, kind) for m in module.modules() for kind in _KINDS)


@contextlib.contextmanager
def without_hooks(module: torch.nn.Module) -> Iterator[None]:
    """Calls of the modules inside ``module`` call no hooks."""
    held = [(m, kind, getattr(m, kind)) for m in module.modules() for kind in _KINDS
            if getattr(m, kind)]  # fmt: skip
    for m, kind, _ in held:
        setattr(m, kind, OrderedDict())
    try:
        yield
    finally:
        for m, kind, hooks in held:
            setattr(m, kind, hooks)


def _ask(module: Any, args: Any, output: Any) -> None:
    output.requires_grad_(True)


def _asks(hook: Any) -> bool:
    """All it does is to have the output of its module learn."""
    code, own = getattr(hook, "__code__", None), _ask.__code__
    return code is not None and all(
        getattr(code, name) == getattr(own, name)
        for name in ("co_argcount", "co_code", "co_consts", "co_names", "co_freevars")
    )


@contextlib.contextmanager
def without_asking(module: torch.nn.Module, but: int = 0) -> Iterator[None]:
    """Calls of the modules inside ``module`` do not ask for gradients of what they give, ``but``
    for so many hooks of each: a checkpoint wants to be asked. transformers adds such a hook
    whenever checkpointing is switched on, and trainers switch it off and on at every step.
    """
    held = []
    for hooks in (m._forward_hooks for m in module.modules() if m._forward_hooks):
        if asking := [k for k, hook in hooks.items() if _asks(hook)][but:]:
            held.append((hooks, dict(hooks), asking))
            for key in asking:
                del hooks[key]
    try:
        yield
    finally:
        for hooks, before, asking in held:
            now = {k: h for k, h in before.items() if k in hooks or k in asking} | hooks
            hooks.clear()
            hooks.update(now)


@contextlib.contextmanager
def own_hooks_uncaptured(model: torch.nn.Module) -> Iterator[None]:
    """Hooks before and after the forward of ``model`` itself run as they are: what they see is not
    in the capture yet, or has left it, and may be a tensor that Dynamo knows nothing of.
    """
    both: tuple[dict[int, Any], ...] = model._forward_pre_hooks, model._forward_hooks
    held = [dict(hooks) for hooks in both]
    apart = [{k: torch.compiler.disable(h) for k, h in hooks.items()} for hooks in both]
    for hooks, own in zip(both, apart, strict=True):
        hooks.update(own)
    try:
        yield
    finally:  # one may have removed or added some
        for hooks, own, old in zip(both, apart, held, strict=True):
            hooks.update((k, old[k]) for k, h in own.items() if hooks.get(k) is h)


_hooks_lock = threading.Lock()
_hooks_wanted = 0


@contextlib.contextmanager
def gradient_hooks() -> Iterator[None]:
    """Dynamo captures hooks on gradients, which it does where its compiled autograd is on: as calls
    that register them, and a state object among the inputs that holds them at every call.
    """
    global _hooks_wanted
    with _hooks_lock:
        _hooks_wanted += 1
        compiled_autograd.compiled_autograd_enabled = True
    try:
        yield
    finally:
        with _hooks_lock:
            _hooks_wanted -= 1
            compiled_autograd.compiled_autograd_enabled = _hooks_wanted > 0


def is_hook(node: fx.Node) -> bool:
    """The node registers hooks on gradients, or gives the values that they watch."""
    if node.op == "call_method" and isinstance(holder := node.args[0], fx.Node):
        return isinstance(holder.meta.get("example_value"), BackwardHook)
    names = ("_register_hook_trampoline", "_in_graph_bw_hooks", "_fxmem_watched")
    if node.op == "call_function" and node.target is operator.getitem:
        (source, *_) = node.args
        return isinstance(source, fx.Node) and source.op == "call_method" and is_hook(source)
    return node.op == "call_function" and getattr(node.target, "__name__", "") in names


def is_hook_state(node: fx.Node) -> bool:
    """The input through which a capture gets its hooks at every call."""
    return isinstance(node.meta.get("example_value"), BackwardState)


def watched(register: Any) -> Callable[..., Any]:
    """``fn(value, state)``: the value anew, with what ``register`` registers on it."""

    def _fxmem_watched(value: torch.Tensor, state: Any) -> torch.Tensor:
        new = value.view_as(value)
        if new.requires_grad:
            register(new, state)
        return new

    return _fxmem_watched


def saved_elsewhere() -> bool:
    """What autograd saves goes through hooks of the caller's: a checkpoint, or an offload."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def accumulates_in_this_pass(leaf: Any) -> bool:
    """Whether the autograd pass that runs now adds to the ``.grad`` of a leaf, by its node."""
    try:
        return torch._C._will_engine_execute_node(leaf)
    except RuntimeError:  # autograd.grad returns that gradient
        return False
