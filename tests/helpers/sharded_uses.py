"""Uses of ``fully_shard`` that its documentation offers: how each shards, and what it then runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import tiny
import torch
from sharded import (
    by_layer,
    counted,
    difference,
    head_apart,
    inputs,
    state,
    steps,
    stream,
    whole_at_once,
)
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import Shard

import fxmem

Shards = Callable[[Any], Any]
Runs = Callable[[Any, int], Any]


def two_steps(net: Any, rank: int) -> Any:
    return steps(net, [inputs(rank), inputs(rank, 1)])


def ahead(
    count: int, groups: Callable[[Any], list[Any]] = lambda m: list(m.model.layers)
) -> Shards:
    """Every group asks for the next ones, in both directions."""

    def shard(model: Any) -> None:
        by_layer(model)
        layers = list(model.model.layers)
        for i, layer in enumerate(layers):
            layer.set_modules_to_forward_prefetch(layers[i + 1 : i + 1 + count])
            layer.set_modules_to_backward_prefetch(layers[max(0, i - count) : i][::-1])
        model.set_modules_to_forward_prefetch(layers[:1])
        model.set_modules_to_backward_prefetch(layers[-1:])

    return shard


def in_pairs(model: Any) -> None:
    layers = model.model.layers
    for i in range(0, len(layers), 2):
        fully_shard([layers[i], layers[i + 1]])
    fully_shard(model)


def embedding_apart(model: Any) -> None:
    fully_shard(model.model.embed_tokens)
    model.model.embed_tokens.set_unshard_in_backward(False)
    by_layer(model)


def tied_together(model: Any) -> None:
    fully_shard([model.model.embed_tokens, model.lm_head])
    by_layer(model)


def by_columns(model: Any) -> None:
    by_layer(model, shard_placement_fn=lambda p: Shard(1 if p.ndim == 2 else 0))


def divided(model: Any) -> None:
    by_layer(model)
    for net, factor in ((model, 3.0), *((layer, 5.0) for layer in model.model.layers)):
        net.set_force_sum_reduction_for_comms(True)
        net.set_gradient_divide_factor(factor)


def knobs(model: Any) -> None:
    by_layer(model)
    model.set_reduce_scatter_unused_params(True)
    model.set_reduce_scatter_max_input_buffers(3)
    model.set_separate_reduce_scatter_group(True)
    model._set_unshard_async_op(True)


def checkpointed(model: Any) -> None:
    model.config.use_cache = False
    model.model.layers = nn.ModuleList([checkpoint_wrapper(x) for x in model.model.layers])
    by_layer(model)


def compiled(model: Any) -> None:
    layers = model.model.layers
    for i, layer in enumerate(layers):
        layers[i] = torch.compile(layer, backend="eager")
    by_layer(model, mp_policy=MixedPrecisionPolicy(output_dtype=torch.float64))


def cast(model: Any) -> None:
    by_layer(model, mp_policy=MixedPrecisionPolicy(output_dtype=torch.float64))


def own_method(model: Any) -> None:
    type(model).loss_of = lambda self, batch: self(**batch).loss * 2
    by_layer(model)
    register_fsdp_forward_method(model, "loss_of")


def some_ignored(model: Any) -> None:
    own = {model.lm_head.weight, model.model.layers[0].mlp.up_proj.weight}
    for layer in model.model.layers:
        fully_shard(layer, ignored_params=own)
    fully_shard(model, ignored_params=own)


def by_hand(net: Any, rank: int) -> Any:
    """Groups are opened before the call, waited for or not."""
    found = []
    for i in range(2):
        net.zero_grad()
        waits = [x.unshard(async_op=True) for x in (net, *net.model.layers)]
        for wait in waits if i else ():
            wait.wait()
        loss = net(**inputs(rank, i)).loss
        for layer in net.model.layers:
            layer.unshard(async_op=True)
        loss.backward()
        found.append(([loss.item()], state(net)))
    return found


def open_between_steps(net: Any, rank: int) -> Any:
    for i in range(3):
        last = i == 2
        net.set_requires_gradient_sync(last)
        net.set_reshard_after_backward(last)
        net.set_is_last_backward(last)
        net.set_reshard_after_forward(i != 1)
        net(**inputs(rank, i)).loss.backward()
    return [([], state(net))]


def called_twice(net: Any, rank: int) -> Any:
    """Backwards of parts of one call, and of one loss twice."""
    found = []
    result = net(**inputs(rank), output_hidden_states=True)
    result.loss.backward(retain_graph=True)
    found.append(([], state(net)))
    result.hidden_states[1].square().mean().backward(retain_graph=True)
    found.append(([], state(net)))
    result.loss.backward()
    return [*found, ([], state(net))]


def several_calls(net: Any, rank: int) -> Any:
    """Of one backward; one has one token on a rank and runs as plain there, at any place."""
    found = []
    for at in range(3):
        net.zero_grad()
        calls = [inputs(rank, i)["input_ids"] for i in range(3)]
        calls[at] = calls[at][:, : None if rank else 1]
        losses = []
        for ids in calls:
            losses.append(net(input_ids=ids).logits.square().mean())
            losses[-1].item()
        loss = torch.stack(losses).sum()
        loss.backward()
        found.append(([loss.item()], state(net)))
    return found


def long_and_short(net: Any, rank: int) -> Any:
    """Calls that stream on one rank, and on the other run as plain: they are small."""
    found = []
    for i in range(3):
        net.zero_grad()
        loss = net(**(tiny.batch(1, 6) if (rank + i) % 2 else tiny.batch(24, 100)))
        loss = getattr(loss, "loss", loss)
        loss.backward()
        found.append(([loss.item()], state(net)))
    return found


def of_inputs_only(net: Any, rank: int) -> Any:
    """No parameter gets a gradient, and nothing is reduced; then a step."""
    torch.manual_seed(rank)
    given = torch.randn(2, 30 + 9 * rank, 32, dtype=torch.float64, requires_grad=True)
    loss = net(inputs_embeds=given, labels=torch.randint(50, given.shape[:2])).loss
    (found,) = torch.autograd.grad(loss, given)
    before = state(net)
    return [([], {"given": found}), ([], before), *_of(two_steps(net, rank))]


def learning_changes(net: Any, rank: int) -> Any:
    found = []
    for i in range(3):
        net.zero_grad()
        net.model.layers[0].requires_grad_(i != 1)
        net(**inputs(rank, i)).loss.backward()
        found.append(([], state(net)))
    return found


def evaluated_between(net: Any, rank: int) -> Any:
    """Before the backward, with other lengths, without gradients in two ways."""
    loss, found = net(**inputs(rank)).loss, []
    with torch.no_grad():
        found.append(net(**inputs(rank, 5)).loss.item())
    loss.backward()
    net.eval()
    with torch.inference_mode():
        found.append(net(**tiny.batch(3, 7)).loss.item())
    net.train()
    return [(found, state(net))]


def called_by_method(net: Any, rank: int) -> Any:
    loss = net.loss_of(inputs(rank))
    loss.backward()
    return [([loss.item()], state(net))]


def foreign(net: Any, rank: int) -> Any:
    """A function of the caller's between logits and loss."""
    given = {k: v for k, v in inputs(rank).items() if k != "labels"}
    rows = net(**given).logits.logsumexp(-1)
    loss = Doubled.apply(rows).square().mean() + rows.mean()
    loss.backward()
    return [([loss.item()], state(net))]


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


@dataclasses.dataclass
class Result:
    loss: Tensor
    logits: Tensor


class InDataclass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner: Any = tiny.model().double()

    def forward(self, **given: Any) -> Result:
        out = self.inner(**given)
        return Result(out.loss, out.logits)


def result_cast(model: Any) -> None:
    for layer in model.inner.model.layers:
        fully_shard(layer)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(output_dtype=torch.bfloat16))


def result_of(net: Any, rank: int) -> Any:
    loss = net(**inputs(rank)).loss
    assert loss.dtype == torch.bfloat16
    loss.double().backward()
    return [([loss.item()], state(net))]


class Looped(nn.Module):
    """It goes through its layers twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner: Any = tiny.model().double()

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        h = self.inner.model(input_ids, attention_mask=attention_mask)[0]
        h = self.inner.model(inputs_embeds=h, attention_mask=attention_mask)[0]
        logits = self.inner.lm_head(h)
        loss: Tensor = logits.square().mean()
        return loss if labels is None else loss + self.inner.loss_function(logits, labels, 50)


def looped_layers(model: Any) -> None:
    for layer in model.inner.model.layers:
        fully_shard(layer)
    fully_shard(model)


def looped_pair(model: Any) -> None:
    fully_shard(list(model.inner.model.layers))
    fully_shard(model)


def looped(net: Any, rank: int) -> Any:
    """Then with one token on a rank."""
    found = []
    for length in (None, None if rank else 1):
        net.zero_grad()
        batch = inputs(rank)
        if length is not None:
            batch = {"input_ids": batch["input_ids"][:, :length]}
        loss = net(**batch)
        loss.backward()
        found.append(([loss.item()], state(net)))
    return found


def llama(**changes: Any) -> Callable[[], Any]:
    return lambda: tiny.model(**changes).double()


USES: dict[str, tuple[Callable[[], Any], Shards, Runs]] = {
    "prefetch 1": (llama(num_hidden_layers=4), ahead(1), two_steps),
    "prefetch 2": (llama(num_hidden_layers=4), ahead(2), two_steps),
    "pairs": (llama(num_hidden_layers=4), in_pairs, two_steps),
    "embedding apart": (llama(), embedding_apart, two_steps),
    "tied": (lambda: tiny.model("qwen2").double(), tied_together, two_steps),
    "tied, foreign": (lambda: tiny.model("qwen2").double(), tied_together, foreign),
    "columns": (llama(), by_columns, two_steps),
    "divided": (llama(), divided, two_steps),
    "knobs": (llama(), knobs, two_steps),
    "checkpointed": (llama(), checkpointed, two_steps),
    "compiled": (llama(), compiled, two_steps),
    "cast": (llama(), cast, two_steps),
    "cast, outside": (llama(), cast, foreign),
    "cast, dataclass": (InDataclass, result_cast, result_of),
    "method": (llama(), own_method, called_by_method),
    "ignored": (llama(), some_ignored, lambda net, rank: called_twice(net, rank)[:1]),
    "by hand": (llama(), by_layer, by_hand),
    "open between steps": (llama(), by_layer, open_between_steps),
    "called twice": (llama(), by_layer, called_twice),
    "long and short": (llama(), by_layer, long_and_short),
    "long and short, embedding": (llama(), embedding_apart, long_and_short),
    "long and short, head": (llama(), head_apart, long_and_short),
    "long and short, tied": (lambda: tiny.model("qwen2").double(), tied_together, long_and_short),
    "long and short, looped": (Looped, looped_layers, long_and_short),
    "several calls": (llama(), by_layer, several_calls),
    "several calls, head": (llama(), head_apart, several_calls),
    "several calls, tied": (lambda: tiny.model("qwen2").double(), tied_together, several_calls),
    "looped": (Looped, looped_layers, looped),
    "looped pair": (Looped, looped_pair, looped),
    "inputs only": (llama(), by_layer, of_inputs_only),
    "learning changes": (llama(), by_layer, learning_changes),
    "evaluated between": (llama(), by_layer, evaluated_between),
}  # fmt: skip


def _of(result: Any) -> list[Any]:
    """As a list of losses and states."""
    return [tuple(result)] if isinstance(result[0], list) else result


def used(rank: int, names: list[str]) -> dict[str, Any]:
    """By use: what :func:`compared` finds."""
    return {name: compared(*USES[name], rank) for name in names}


def compared(make: Callable[[], Any], shard: Shards, run: Runs, rank: int) -> Any:
    """The largest difference; what plain and streamed have sent, and had whole at once; bodies."""
    results, sent, whole = [], [], []
    for streamed in (False, True):
        torch.manual_seed(0)
        net = make()
        shard(net)
        if streamed and run is long_and_short:
            fxmem.transform(net)
        elif streamed:
            stream(net, 9)
        with counted() as collectives, whole_at_once() as most:
            results.append(_of(run(net, rank)))
        whole.append(most[0])
        sent.append(dict(collectives))
    worst = max(difference(a, b) for a, b in zip(*results, strict=True))
    return worst, *sent, *whole, fxmem.explain(net).executed_bodies
