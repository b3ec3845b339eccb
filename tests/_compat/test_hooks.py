"""Backward passes and hooks: one small check per private name that they need."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.checkpoint

from fxmem._compat import flags as _compat_flags
from fxmem._compat import graph as _compat
from fxmem._compat import hooks as _compat_hooks
from fxmem._compat import tracing


def test_backward_passes_have_numbers() -> None:
    seen = []
    for _ in range(2):
        x = torch.ones(2, requires_grad=True)
        y = x * 2
        for value in (x, y):
            value.register_hook(lambda grad: seen.append(_compat.backward_id()))
        y.sum().backward()
    assert seen[0] == seen[1] != seen[2] == seen[3]
    assert _compat.backward_id() == -1


def test_after_a_backward_is_after_all_of_it() -> None:
    seen: list[str] = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2

    def inside(_: torch.Tensor) -> None:
        _compat.after_backward(lambda: seen.append("end"))
        seen.append("inside")

    y.register_hook(inside)
    x.register_hook(lambda _: seen.append("x"))
    y.sum().backward()
    assert seen == ["inside", "x", "end"]


def test_which_nodes_a_backward_runs() -> None:
    x, w = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    y = x * 2
    z, seen = y * w, []  # type: torch.Tensor, list[bool]
    z.register_hook(lambda grad: seen.append(_compat.runs_in_this_pass(y.grad_fn)))
    torch.autograd.grad(z.sum(), [w], retain_graph=True)
    z.sum().backward()
    assert seen == [False, True]


def test_which_leaves_a_backward_adds_to() -> None:
    x, w = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    z, seen = x * w, []  # type: torch.Tensor, list[bool]
    leaf = z.grad_fn.next_functions[1][0]  # type: ignore[union-attr]
    z.register_hook(lambda grad: seen.append(_compat_hooks.accumulates_in_this_pass(leaf)))
    for wanted in ([w], [x], [x, w]):
        torch.autograd.grad(z.sum(), wanted, retain_graph=True)
    z.sum().backward(inputs=[w], retain_graph=True)
    z.sum().backward()
    assert seen == [False, False, False, True, True]


def test_own_hooks_run_uncaptured() -> None:
    """They may remove themselves and add others."""
    model = torch.nn.Linear(2, 2)

    def hook(*_: Any) -> None:
        torch._dynamo.graph_break()  # an error where it is captured
        first.remove()
        model.register_forward_hook(later)

    def later(*_: Any) -> None: ...

    def before(*_: Any) -> None:
        torch._dynamo.graph_break()
        early.remove()
        model.register_forward_pre_hook(later)

    early = model.register_forward_pre_hook(before)
    first = model.register_forward_hook(hook)
    call = torch.compile(model._call_impl, backend="eager", fullgraph=True)
    with _compat_hooks.own_hooks_uncaptured(model):
        call(torch.ones(1, 2))
    assert list(model._forward_hooks.values()) == [later]
    assert list(model._forward_pre_hooks.values()) == [later]


def test_gradient_hooks_are_nodes() -> None:
    kinds: list[str] = []

    def record(gm: torch.fx.GraphModule, inputs: list[object]) -> object:
        kinds.extend(str(n.target) for n in gm.graph.nodes if _compat_hooks.is_hook(n))
        assert sum(_compat_hooks.is_hook_state(n) for n in gm.graph.nodes) == 1
        return gm.forward

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.inner(x * 2)
            y.register_hook(lambda g: g * 3)
            return y.sum()

    net = Net()
    seen: list[torch.Tensor] = []
    net.inner.register_full_backward_hook(lambda m, i, o: seen.extend([*i, *o]))
    x = torch.ones(1, 2, requires_grad=True)
    with _compat_hooks.gradient_hooks():
        loss = torch.compile(net, backend=record, fullgraph=True)(x)
    loss.backward()
    assert torch.equal(seen[1], torch.full((1, 2), 3.0))
    assert len(kinds) == 5  # two of the tensor's and module's, one each for input and output


def test_a_function_runs_no_hook_of_all_modules() -> None:
    gm = torch.fx.symbolic_trace(torch.nn.Identity())
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, a, o: o * 2)
    assert gm(torch.ones(())) == 2
    assert _compat_hooks.function(gm)(torch.ones(())) == 1
    before = _compat_hooks.unguarded(gm)
    handle.remove()
    assert _compat_hooks.unguarded(gm) != before


def test_hooks_that_only_ask_for_gradients_are_set_aside() -> None:
    """By what they do, wherever they come from; the others stay, and all are back in order."""
    inner = torch.nn.Linear(2, 2)
    net = torch.nn.Sequential(inner)

    def asks(module: object, args: object, out: torch.Tensor) -> None:
        out.requires_grad_(True)

    def asks_not(module: object, args: object, out: torch.Tensor) -> None:
        out.requires_grad_(False)

    def doubles(module: object, args: object, out: torch.Tensor) -> torch.Tensor:
        return out * 2

    gone, *_ = [inner.register_forward_hook(h) for h in (doubles, asks, asks_not, asks, doubles)]
    inner.register_forward_hook(lambda m, a, o: o.requires_grad_(True))  # it returns it as well
    hooks = list(inner._forward_hooks.items())
    for but in range(3):
        with _compat_hooks.without_asking(net, but):
            left = [h for h in inner._forward_hooks.values() if h is asks]
            assert len(left) == but and len(inner._forward_hooks) == 4 + but
        assert list(inner._forward_hooks.items()) == hooks
    with _compat_hooks.without_asking(net):
        gone.remove()
        new = inner.register_forward_hook(doubles)
    assert list(inner._forward_hooks.items()) == [*hooks[1:], (new.id, doubles)]


def test_old_hooks_are_known() -> None:
    module = torch.nn.Linear(2, 2)
    assert not _compat_hooks.has_old_hooks(module)
    module.register_backward_hook(lambda m, i, o: None)
    assert _compat_hooks.has_old_hooks(module)


def test_what_dynamo_skips_is_a_known_option() -> None:
    with _compat.capture_config():
        assert not torch._dynamo.config.skip_nnmodule_hook_guards


def test_reads_of_requires_grad_are_seen() -> None:
    def asks(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.requires_grad else x

    for name in _compat_flags.METHODS:
        assert callable(getattr(_compat_flags.TensorVariable, name))
    x = torch.ones(2, requires_grad=True)
    for fn, wanted in ((asks, True), (torch.sin, False)):
        with _compat_flags.reads() as found:
            torch.compile(fn, backend="eager", fullgraph=True)(x)
        assert bool(found) == wanted


def test_hooks_on_what_is_saved_are_seen() -> None:
    assert not _compat_hooks.saved_elsewhere()
    with torch.autograd.graph.save_on_cpu():
        assert _compat_hooks.saved_elsewhere()
        with tracing.nothing_saved():
            assert not _compat_hooks.saved_elsewhere()
