"""Hooks and changed modules between steps: as in plain PyTorch, whenever they come and go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
import twins
from torch import Tensor, nn
from torch.nn.modules import module as every_module
from torch.utils.checkpoint import checkpoint
from twins import agree, some, step

import fxmem
from fxmem.runtime import loops
from fxmem.runtime.counters import COUNTER

Handles = list[Any]
Change = Callable[[Any, Handles], None]


def times(factor: float) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return output * factor
        return {k: v * factor for k, v in output.items()}

    return hook


def forward_hooks(net: Any, handles: Handles) -> None:
    handles += [
        net.layers[0].register_forward_hook(times(2)),
        net.layers[1].up.register_forward_hook(times(0.5)),
        net.layers[1].up.register_forward_hook(lambda m, a, o: o + 1, prepend=True),
        net.layers[1].register_forward_hook(
            lambda m, a, k, o: o * 1.5, with_kwargs=True, always_call=True
        ),
        net.register_forward_hook(times(3)),
    ]


def forward_pre_hooks(net: Any, handles: Handles) -> None:
    handles += [
        net.layers[0].register_forward_pre_hook(lambda m, a: (a[0] * 1.5,)),
        net.layers[1].norm.register_forward_pre_hook(
            lambda m, a, k: ((a[0] + 1,), k), with_kwargs=True
        ),
        net.register_forward_pre_hook(lambda m, a: ((a[0] + 1) % twins.VOCAB,)),
    ]


def hooks_of_all_modules(net: Any, handles: Handles) -> None:
    handles += [
        every_module.register_module_forward_hook(times(1.1)),
        every_module.register_module_forward_pre_hook(
            lambda m, a: (a[0] * 1.1,) if a[0].is_floating_point() else None
        ),
    ]


def another_hook_of_all_modules(net: Any, handles: Handles) -> None:
    first = every_module.register_module_forward_hook(times(1.1))
    step(net)
    first.remove()
    handles.append(
        every_module.register_module_forward_hook(
            lambda m, a, o: o - 1 if isinstance(o, Tensor) else o
        )
    )


def a_closure_that_changes(net: Any, handles: Handles) -> None:
    factor = 2.0
    handles.append(net.layers[0].register_forward_hook(lambda m, a, o: o * factor))
    step(net)
    factor = 3.0


def another_hook_in_its_place(net: Any, handles: Handles) -> None:
    first = net.layers[0].register_forward_hook(times(2))
    step(net)
    first.remove()
    handles.append(net.layers[0].register_forward_hook(lambda m, a, o: o - 1))


@some(
    [forward_hooks, another_hook_of_all_modules],
    [forward_pre_hooks, hooks_of_all_modules, a_closure_that_changes, another_hook_in_its_place],
)
def test_forward_hooks_come_and_go(change: Change) -> None:
    models = twins.pair()
    agree(models)
    handles: Handles = []
    for net in models:
        change(net, handles)
        if "all_modules" in change.__name__ and net is models[0]:
            step(models[1])
            break
    try:
        agree(models)
    finally:
        for handle in handles:
            handle.remove()
    agree(models)


def test_checkpoints_switched_off_and_on_capture_nothing() -> None:
    """As trainers do around what they generate. Each time transformers adds one more hook."""
    net = tiny.model()
    net.activation_checkpointing_enable()
    fxmem.transform(net, twins.PLAN)
    before = COUNTER.captures
    for _ in range(3):
        tiny.step(net, tiny.batch(2, 13))
        net.activation_checkpointing_disable()
        net.activation_checkpointing_enable()
    assert len(net.get_input_embeddings()._forward_hooks) > 2
    assert COUNTER.captures == before + 1


def whole(grads: Any) -> None:
    """Every gradient a hook sees is that of the whole sequence."""
    assert all(g is None or g.shape[:2] == (2, 13) for g in grads)


def backward_hooks(net: Any, handles: Handles, seen: list[Any]) -> None:
    def after(module: nn.Module, inputs: Any, outputs: Any) -> Any:
        whole([*inputs, *outputs])
        seen.append((type(module).__name__, [*inputs, *outputs]))
        return tuple(None if g is None else g * 2 for g in inputs)

    def before(module: nn.Module, outputs: Any) -> Any:
        whole(outputs)
        seen.append((type(module).__name__, list(outputs)))
        return tuple(g + 0.1 for g in outputs)

    for module in (net.layers[0], net.layers[1], net.layers[1].up, net.norm):
        handles.append(module.register_full_backward_hook(after))
        handles.append(module.register_full_backward_pre_hook(before))


def hooks_on_tensors(net: Any, handles: Handles, seen: list[Any]) -> None:
    def gradient(name: str) -> Callable[[Tensor], Tensor]:
        def hook(grad: Tensor) -> Tensor:
            whole([grad])
            seen.append((name, [grad]))
            return grad * 2

        return hook

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            args[0].register_hook(gradient(f"{name} in"))
            output.register_hook(gradient(f"{name} out"))
            output.register_hook(lambda g: g + 0.1)

        return hook

    for name in ("layers.0", "layers.1.up", "layers.1.mix", "layers.1.drop", "norm"):
        handles.append(net.get_submodule(name).register_forward_hook(watch(name)))


def hooks_on_parameters(net: Any, handles: Handles, seen: list[Any]) -> None:
    for name, p in net.named_parameters():
        handles.append(p.register_hook(lambda g, n=name: seen.append((n, [g])) or g * 2))
        handles.append(
            p.register_post_accumulate_grad_hook(lambda p, n=name: seen.append((n, [p.grad])))
        )


@pytest.mark.parametrize("early", [True, pytest.param(False, marks=pytest.mark.slow)])
@some([backward_hooks, hooks_on_tensors], [hooks_on_parameters])
def test_gradient_hooks_see_whole_gradients_once(change: Any, early: bool) -> None:
    models = twins.pair()
    if not early:
        agree(models)
    seen: tuple[list[Any], list[Any]] = [], []
    handles: Handles = []
    for net, calls in zip(models, seen, strict=True):
        change(net, handles, calls)
    agree(models)
    assert sorted(n for n, _ in seen[0]) == sorted(n for n, _ in seen[1])
    key = lambda call: (call[0], len(call[1]))  # noqa: E731
    for (name, want), (_, got) in zip(
        sorted(seen[0], key=key), sorted(seen[1], key=key), strict=True
    ):
        for a, b in zip(got, want, strict=True):
            twins.same(a, b, name)
    for handle in handles:
        handle.remove()
    agree(models)


class Everywhere(set[int]):
    """Every address is one where a gradient of its own lay before."""

    def __contains__(self, address: object) -> bool:
        return True


@pytest.mark.parametrize("change", [backward_hooks, hooks_on_tensors])
def test_what_a_hook_keeps_stays_what_it_is(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever memory of gradients that are gone is used again."""
    first = loops.CallState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        first(self, *args, **kwargs)
        self.fresh = Everywhere()

    monkeypatch.setattr(loops.CallState, "__init__", init)
    test_gradient_hooks_see_whole_gradients_once(change, True)


def test_what_a_forward_hook_keeps() -> None:
    models = twins.pair()
    kept: list[list[Tensor]] = [[], []]
    for net, values in zip(models, kept, strict=True):
        step(net)
        net.layers[0].register_forward_hook(lambda m, a, o, v=values: v.append(o.detach()))
    agree(models)
    (want,), (got,) = kept
    twins.same(got, want)


def test_a_loss_of_what_forward_hooks_keep() -> None:
    """Beside the model's own loss: states leave the call, at any layer, late and removed again."""
    models = twins.pair()
    losses = []
    for net in models:
        step(net)
        kept: dict[nn.Module, Tensor] = {}
        watched = (net.embed, *net.layers)
        handles = [
            m.register_forward_hook(lambda m, a, o, kept=kept: kept.update({m: o})) for m in watched
        ]
        net.zero_grad()
        loss = net(twins.ids())["loss"] + sum(h.square().mean() for h in kept.values())
        loss.backward()
        losses.append(loss.detach())
        for handle in handles:
            handle.remove()
    twins.same(losses[1], losses[0], "loss")
    twins.same_gradients(models[1], models[0])
    agree(models)


def test_a_hook_on_a_value_that_never_stands_whole() -> None:
    class Scores(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return q @ q.transpose(1, 2)

    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix, self.scores = nn.Embedding(11, 8), nn.Linear(8, 8), Scores()

        def forward(self, ids: Tensor) -> dict[str, Tensor]:
            x = self.embed(ids)
            x = x + self.scores(self.mix(x)).softmax(-1) @ x
            return {"loss": x.square().mean()}

    models = twins.pair(Mixing())
    agree(models)
    handle = models[1].scores.register_full_backward_hook(lambda m, i, o: None)
    with pytest.raises(fxmem.HookError, match=r"T x T.*scores.*hidden states"):
        step(models[1])
    handle.remove()
    agree(models)


def test_an_old_kind_of_hook_is_refused() -> None:
    models = twins.pair()
    agree(models)
    handle = models[1].layers[0].register_backward_hook(lambda m, i, o: None)
    with pytest.raises(fxmem.HookError, match="register_full_backward_hook"):
        step(models[1])
    handle.remove()
    agree(models)


def test_two_names_of_one_tensor() -> None:
    """`contiguous`, `to` and the like give the tensor back, so a hook sees the gradient of all."""

    class Names(twins.Net):
        def forward(self, ids: Tensor) -> dict[str, Tensor]:
            x = self.embed(ids)
            y = x.contiguous().to(x.dtype)
            y.register_hook(lambda g: g * 2)
            x.register_hook(lambda g: g + 0.1)
            y = self.layers[0](F.dropout(y, 0.0)) + x
            y.register_hook(lambda g: g.square())
            return {"loss": F.cross_entropy((y @ self.shift).flatten(0, 1), ids.flatten())}

    agree(twins.pair(Names()))


def test_hooks_under_an_activation_checkpoint() -> None:
    class Checkpointed(twins.Net):
        def forward(self, ids: Tensor) -> dict[str, Tensor]:
            x = self.embed(ids)
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)
            return {"loss": F.cross_entropy((x @ self.shift).flatten(0, 1), ids.flatten())}

    models = twins.pair(Checkpointed())
    for net in models:
        net.layers[1].register_full_backward_hook(lambda m, i, o: (i[0] * 2,))
    agree(models)


class WritesToWatched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).tanh()
        if x.requires_grad:
            x.register_hook(lambda grad: grad * 2)
        x = x.contiguous()  # the same tensor
        x += 1
        return F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_a_write_to_a_value_that_a_hook_watches_is_refused_by_name() -> None:
    net = fxmem.transform(WritesToWatched())
    with pytest.raises(fxmem.MutationError, match="iadd"):
        net(torch.randint(0, 11, (2, 9)))
