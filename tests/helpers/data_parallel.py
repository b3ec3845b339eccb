"""One rank of a step under DistributedDataParallel."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import tiny
import torch
import transformers as tf
from double import everything_in_double, largest_difference
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powerSGD

import fxmem

LENGTHS = (37, 64)
"""One per rank: another number of chunks, so a collective inside a loop would hang."""


def inputs(rank: int) -> dict[str, Tensor]:
    return tiny.batch(2, LENGTHS[rank], padding=("left", "mixed")[rank])


def run_rank(
    rank: int, file: str, out: str, name: str, options: Any, order: str, stream: Any
) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2
    )
    with everything_in_double():
        model = tiny.model(name).double()
        plan = fxmem.Plan(stream=fxmem.Stream(chunk=9, **stream))
        if order == "before":
            fxmem.transform(model, plan)
        net: Any = nn.parallel.DistributedDataParallel(model, **options)
        if order == "after":
            fxmem.transform(net, plan)
        if options.keys() <= {"gradient_as_bucket_view"}:
            with net.no_sync():
                net(**inputs(1 - rank)).loss.backward()
            net.zero_grad()
        for _ in range(2):
            net(**inputs(rank)).loss.backward()
    bodies = fxmem.explain(net).executed_bodies
    torch.save(({n: p.grad for n, p in model.named_parameters()}, bodies), f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


def weights_of_trainer(folder: str, *, stream: bool) -> dict[str, Tensor]:
    """Two steps of transformers' Trainer with its own arguments for several processes."""
    model = tiny.model("llama").double()
    if stream:
        fxmem.transform(model, fxmem.Plan(stream=fxmem.Stream(chunk=9)))
    rows = [{k: v[0] for k, v in tiny.batch(1, n).items()} for n in (37, 64, 37, 64)]
    rows = [{k: row[k] for k in ("input_ids", "labels")} for row in rows]
    arguments = tf.TrainingArguments(
        folder, per_device_train_batch_size=1, max_steps=2, learning_rate=1e-2, save_strategy="no",
        report_to=[], use_cpu=True, logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    tf.Trainer(model=model, args=arguments, train_dataset=rows).train()
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def run_trainer(rank: int, port: int, out: str) -> None:
    """A rank of torchrun, streamed and plain."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    with everything_in_double():
        both = [weights_of_trainer(out, stream=s) for s in (False, True)]
    torch.save(both, f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


def hook_runs(rank: int) -> tuple[dict[str, tuple[float, bool]], dict[str, Tensor]]:
    """Steps with hooks that compress what is sent: how far streamed is from plain, and whether the
    hook made a difference; and streamed weights of one that is not comparable.
    """
    ways: dict[str, Callable[[], tuple[Any, Any]]] = {
        "none": lambda: (None, default_hooks.allreduce_hook),
        # under its own name it is refused without a GPU
        "bf16": lambda: (
            None,
            lambda state, bucket: default_hooks.bf16_compress_hook(state, bucket),
        ),
        "fp16": lambda: (None, default_hooks.fp16_compress_wrapper(default_hooks.allreduce_hook)),
        "power": lambda: _power(64),
    }
    found: dict[str, tuple[float, bool]] = {}
    exact: dict[str, Tensor] = {}
    for name, way in ways.items():
        weights = [_hooked(rank, way, stream=stream) for stream in (False, True)]
        exact = exact or weights[0]
        compressed = largest_difference(weights[0], exact)[0] > 1e-6
        found[name] = largest_difference(weights[1], weights[0])[0], compressed
    return found, _hooked(rank, lambda: _power(2), stream=True)


def _power(rank: int) -> tuple[Any, Any]:
    """PowerSGD starts from noise that depends on the order in which gradients arrive, which DDP
    keeps to, so that two orders are comparable at full rank only.
    """
    state = powerSGD.PowerSGDState(
        None, matrix_approximation_rank=rank, start_powerSGD_iter=2, min_compression_rate=0
    )
    return state, powerSGD.powerSGD_hook


def _hooked(rank: int, way: Callable[[], tuple[Any, Any]], *, stream: bool) -> dict[str, Tensor]:
    model = tiny.model().double()
    if stream:
        fxmem.transform(model, fxmem.Plan(stream=fxmem.Stream(chunk=9)))
    net = nn.parallel.DistributedDataParallel(model)
    net.register_comm_hook(*way())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        net(**inputs(rank)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach() for n, p in model.named_parameters()}


class Writing(nn.Module):
    """A model that writes to what it has, in the way of its ``kind``, and reads it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner = tiny.model().double()
        self.kind, self.calls = kind, 0
        self.register_buffer("mean", torch.zeros(self.inner.config.hidden_size))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor) -> Tensor:
        mean: Any = self.mean
        h = self.inner.model(input_ids, attention_mask=attention_mask).last_hidden_state
        if self.kind == "statistic":
            mean.mul_(0.9).add_(0.1 * h.detach().mean((0, 1)))
            h = h - mean
        elif self.kind == "counter":
            self.count += 1
            h = h * (1 + 0.1 * self.count)
        elif h.detach().sum().item() > -torch.inf:  # divides the model into parts
            self.calls += 1
            h = h * 1.5
        logits = self.inner.lm_head(h)
        loss: Tensor = self.inner.loss_function(logits, labels, self.inner.config.vocab_size)
        return loss


def writing(rank: int) -> dict[str, tuple[float, int]]:
    """Three steps of each kind: how far losses, weights and buffers are from plain, and bodies."""
    return {kind: _written(rank, kind) for kind in ("statistic", "counter", "parts")}


def _written(rank: int, kind: str) -> tuple[float, int]:
    results, bodies = [], 0
    for stream in (False, True):
        model = Writing(kind).double()
        net = nn.parallel.DistributedDataParallel(model)
        if stream:
            fxmem.transform(net, fxmem.Plan(stream=fxmem.Stream(chunk=9)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = {}
        for step in range(3):
            loss = net(**inputs((rank + step) % 2))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[f"loss {step}"] = loss.detach()
        results.append({**model.state_dict(), **losses})
        bodies = fxmem.explain(net).executed_bodies if stream else 0
    return largest_difference(results[1], results[0])[0], bodies


def outside(rank: int) -> dict[str, tuple[float, int]]:
    """Losses that are made of what DistributedDataParallel returns, which are copies; of all of it
    or of some: how far gradients are from plain, and bodies.
    """
    losses: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "logits": lambda out, ids: nn.functional.cross_entropy(
            out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        ),
        "states": lambda out, ids: out.hidden_states[1].square().mean(),
    }
    found = {}
    for name in ("llama", "qwen2"):
        for option in ("find_unused_parameters", "static_graph"):
            for kind, loss_of in losses.items():
                results, net = [], None
                for stream in (False, True):
                    net = nn.parallel.DistributedDataParallel(
                        tiny.model(name).double(), **{option: True}
                    )
                    if stream:
                        fxmem.transform(net, fxmem.Plan(stream=fxmem.Stream(chunk=9)))
                    for i in range(2):
                        net.zero_grad()
                        ids = inputs((rank + i) % 2)["input_ids"]
                        loss_of(net(input_ids=ids, output_hidden_states=True), ids).backward()
                    results.append({n: p.grad for n, p in net.named_parameters()})
                plain, got = ({n: g for n, g in r.items() if g is not None} for r in results)
                bodies = fxmem.explain(net).executed_bodies
                found[f"{name} {option} {kind}"] = largest_difference(got, plain)[0], bodies
    return found
