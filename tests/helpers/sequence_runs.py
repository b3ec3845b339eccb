"""Ranks that stream one sequence together: what each finds beside one plain process."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.distributed as dist
from double import largest_difference
from sharded import by_layer, counted, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import fxmem
from fxmem.distributed.sequence import Group
from fxmem.runtime.ranks import Placed

Step = Callable[[nn.Module, dict[str, Tensor]], Any]


def mesh_of(*shape: int, names: tuple[str, ...] = ("sp",)) -> Any:
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def together(model: nn.Module, mesh: Any, chunk: int, lower: Any = "eager", **stream: Any) -> Any:
    """``model``, streamed by the ranks of ``sp``."""
    own = fxmem.Stream(chunk=chunk, sequence="sp", **stream)
    return fxmem.transform(model, fxmem.Plan(stream=own, lower=lower), mesh=mesh)


def error(plain: nn.Module, model: nn.Module, batch: dict[str, Tensor], step: Step) -> float:
    """The largest relative difference of loss and gradients."""
    found = []
    for net in (plain, model):
        net.zero_grad()
        torch.manual_seed(3)
        loss = step(net, batch)
        loss.backward()
        grads = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach(), **grads})
    return largest_difference(found[1], found[0])[0]


def own_loss(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return net(**batch).loss  # type: ignore[no-any-return]


def models(rank: int, names: list[str], lengths: list[int], chunk: int) -> dict[str, float]:
    """By model and length."""
    mesh = mesh_of(dist.get_world_size())
    found = {}
    for name in names:
        plain, model = (tiny.model(name).double() for _ in range(2))
        together(model, mesh, chunk)
        for length in lengths:
            batch = tiny.batch(2, length, padding="mixed" if length > 12 else None)
            before = fxmem.explain(model).executed_bodies
            found[f"{name} {length}"] = error(plain, model, batch, own_loss)
            assert length <= 4 or fxmem.explain(model).executed_bodies > before, name
    return found


class Odd(nn.Module):
    """What a decoder does not do: rows moved along the sequence, a running sum, an op without a
    row, sums that feed what is not linear, and a value that looks both ways."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(tiny.VOCAB, 16)
        self.one, self.two, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 9)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.table(input_ids)
        x = x + torch.tanh(self.one(x)).cumsum(1) / 9
        x = x + torch.sort(self.two(x), dim=1).values
        y = self.one(x)
        x = x + nn.functional.scaled_dot_product_attention(y, self.two(x), y)
        x = torch.cat([x[:, :1], x[:, 1:] * self.two(x[:, :-1])], 1)
        x = x / (1 + x.square().mean((0, 1), keepdim=True))
        logits = self.head(x).log_softmax(-1)
        rows = logits[:, 1:] * logits[:, :-1].exp()
        return rows.mean().exp() + logits.square().sum((1, 2)).sqrt().sum()


def odd(rank: int, lengths: list[int]) -> dict[str, float]:
    mesh = mesh_of(dist.get_world_size())
    plain, model = Odd().double(), Odd().double()
    together(model, mesh, 4)
    return {
        str(n): error(plain, model, tiny.batch(2, n), lambda net, b: net(b["input_ids"]))
        for n in lengths
    }


def smoothed(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A loss outside the model."""
    logits = net(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    labels = batch["labels"][:, 1:].flatten()
    return nn.functional.cross_entropy(logits, labels, ignore_index=-100, label_smoothing=0.1)


def answer(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A loss on the logits of the last rows alone."""
    ids, rows = batch["input_ids"], batch["input_ids"].shape[1] // 2
    logits = net(input_ids=ids, logits_to_keep=rows + 1, use_cache=False).logits[:, :-1]
    return -logits.log_softmax(-1).gather(-1, ids[:, -rows:, None]).mean()  # type: ignore[no-any-return]


def states_too(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Hidden states leave the call."""
    found = net(**batch, output_hidden_states=True)
    return found.loss + sum(h.square().mean(1).exp().sum() for h in found.hidden_states)  # type: ignore[no-any-return]


def twice(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Two forwards, and gradients that are there already."""
    short = {k: v[:, :11] for k, v in batch.items()}
    own_loss(net, short).backward()
    return own_loss(net, batch) + own_loss(net, short)


def embedded(net: Any, batch: dict[str, Tensor]) -> Tensor:
    """Embeddings from outside, which learn."""
    given = net.get_input_embeddings()(batch["input_ids"].flip(1))
    return net(inputs_embeds=given.tanh(), labels=batch["labels"]).loss  # type: ignore[no-any-return]


def frozen(net: Any, batch: dict[str, Tensor]) -> Tensor:
    net.requires_grad_(False)
    for part in (net.model.layers[1].mlp, net.model.layers[0].self_attn.v_proj):
        part.requires_grad_(True)
    return own_loss(net, batch)


def hooked(net: Any, batch: dict[str, Tensor]) -> Tensor:
    """A hook on a gradient in the middle, which sees all of it."""

    def scaled(module: Any, args: Any, output: Tensor) -> None:
        output.register_hook(lambda g: g / (1 + g.abs().max()))

    handle = net.model.layers[0].mlp.register_forward_hook(scaled)
    try:
        return own_loss(net, batch)
    finally:
        handle.remove()


STEPS: tuple[Step, ...] = (own_loss, smoothed, answer, states_too, twice, embedded, hooked, frozen)


def ways(rank: int, names: list[str]) -> dict[str, float]:
    """Steps of other kinds, of one model after the other."""
    found = {}
    for step in STEPS:
        if step.__name__ in names:
            plain, model = (tiny.model("qwen2").double() for _ in range(2))
            together(model, mesh_of(dist.get_world_size()), 4)
            found[step.__name__] = error(plain, model, tiny.batch(2, 23), step)
    return found


def around(rank: int) -> dict[str, Any]:
    """Dropout beside one process that streams alone, evaluation, a copy, and a chunk's forms."""
    mesh, batch = mesh_of(dist.get_world_size()), tiny.batch(2, 23)
    plan = fxmem.Plan(stream=fxmem.Stream(chunk=4))
    changes = {"resid_pdrop": 0.3, "embd_pdrop": 0.2, "attn_pdrop": 0.0}
    alone, model = (tiny.model("gpt2", **changes).double() for _ in range(2))
    fxmem.transform(alone, plan)
    together(model, mesh, 4)
    found: dict[str, Any] = {"dropout": error(alone, model, batch, own_loss)}
    found["copy"] = error(alone, copy.deepcopy(model), batch, own_loss)
    with torch.no_grad(), counted() as sent:
        both = [net.eval()(**batch).loss for net in (alone, model)]
    found["evaluation"] = float((both[0] - both[1]).abs())
    found["sent"] = sent.total()
    return found


def _exchanged(length: int, cut: Placed, dtype: torch.dtype) -> None:
    call = Group.of(mesh_of(dist.get_world_size()), "sp").call(length)  # type: ignore[union-attr]
    shape = [2, 3, 4]
    shape[cut.dim] = cut.outer * length * cut.inner
    torch.manual_seed(length)
    whole = (torch.randn(shape, dtype=torch.float64) * 4).to(dtype)
    (own,) = call.exchange("rows", [whole], [cut], [tuple(shape)])
    assert own.shape[cut.dim] == cut.outer * call.rows * cut.inner
    scalars = torch.arange(length)  # goes in the same message
    (ones,) = call.exchange("rows", [scalars], [Placed(0)], [(length,)])
    again = call.exchange("gather", [own, ones], [cut, Placed(0)], [tuple(shape), (length,)])
    assert torch.equal(again[0], whole) and torch.equal(again[1], scalars)
    if dtype.is_floating_point and dtype.itemsize > 2:
        parts = [whole * (dist.get_rank() + 1), whole + dist.get_rank()]
        (total,) = call.exchange("sum", [parts[0].clone()], [None], [tuple(shape)])
        assert torch.allclose(total, whole * 6, rtol=1e-6)
        sums = call.exchange("scatter", parts, [cut, cut], [tuple(shape)] * 2)
        assert torch.allclose(sums[0], own * 6, rtol=1e-6)
        assert torch.allclose(sums[1], own * 3 + 3, rtol=1e-6)
        assert not parts  # so that they are free while the sums are on their way


def exchanged(rank: int) -> bool:
    """Exchanges among three ranks, which must draw the same."""
    draw = random.Random(0)
    cuts = [Placed(0), Placed(1), Placed(1, 2, 3), Placed(2, 3, 1)]
    types = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool]
    for _ in range(60):
        _exchanged(draw.choice([0, 1, 2, 5, 6, 19]), draw.choice(cuts), draw.choice(types))
    return True


def collectives(rank: int) -> list[dict[str, int]]:
    """Of a step, for several sizes of chunks."""
    found = []
    for chunk in (1, 7, 100):
        model = together(tiny.model().double(), mesh_of(dist.get_world_size()), chunk, hold="none")
        batch = tiny.batch(2, 23)
        with counted() as forward:
            loss = model(**batch).loss
        with counted() as backward:
            loss.backward()
        found.append({f"{k} {n}": v for k, c in (("forward", forward), ("backward", backward))
                      for n, v in c.items()})  # fmt: skip
    return found


def refused(rank: int) -> list[str]:
    """Errors before anything is sent, on every rank."""
    mesh = mesh_of(2, names=("dp",))
    sequence = fxmem.Plan(stream=fxmem.Stream(chunk=4, sequence="sp"))
    tries: tuple[Callable[[], Any], ...] = (
        lambda: fxmem.transform(tiny.model(), sequence),
        lambda: fxmem.transform(tiny.model(), sequence, mesh=mesh),
        lambda: fxmem.transform(tiny.model(), fxmem.Plan(stream=fxmem.Stream()), mesh=mesh),
        lambda: fxmem.backend(sequence),
    )
    found = []
    with counted() as sent:
        for one in tries:
            try:
                one()
                found.append("no error")
            except fxmem.PlanError as raised:
                found.append(str(raised))
    return [*found, str(sent.total())]


def diverged(rank: int) -> tuple[list[str], float]:
    """Ranks that were given different things, each followed by a step that is exact."""
    mesh = mesh_of(2)
    plain, model = tiny.model().double(), tiny.model().double()
    together(model, mesh, 4)
    other = together(tiny.model().double(), mesh, 4 + rank)
    half = tiny.model().double()
    half.lm_head.requires_grad_(rank == 0)
    together(half, mesh, 4)
    batch = tiny.batch(2, 23)
    tries: list[tuple[Any, dict[str, Tensor]]] = [
        (model, tiny.batch(2, 23 + rank)),
        (model, {**batch, "labels": batch["labels"].roll(rank, 1)}),
        (other, batch),
        (half, batch),
    ]
    found = []
    for net, batch_of_rank in tries:
        try:
            net(**batch_of_rank).loss.backward()
            found.append("no error")
        except fxmem.FxmemError as raised:
            found.append(f"{type(raised).__name__}: {raised}")
    return found, error(plain, model, batch, own_loss)


def beside_data(rank: int, names: list[str]) -> dict[str, float]:
    """Two sequences of two ranks each: under FSDP2 and DDP, along the other dimension or all."""
    mesh = mesh_of(2, 2, names=("dp", "sp"))
    every = mesh_of(4, names=("all",))
    batches = [tiny.batch(2, length) for length in (23, 17)]
    plain = tiny.model("qwen2").double()
    for batch in batches:
        own_loss(plain, batch).backward()
    want = {n: p.grad / 2 for n, p in plain.named_parameters()}
    found = {}
    for name in names:
        model: Any = tiny.model("qwen2").double()
        group = mesh["dp"] if name.endswith("dp") else every
        if name.startswith("fsdp"):
            by_layer(model, mesh=group)
            net = together(model, mesh, 4)
        else:
            together(model, mesh, 4)
            net = nn.parallel.DistributedDataParallel(model, process_group=group.get_group())
        own_loss(net, batches[mesh.get_local_rank("dp")]).backward()
        got = {n: whole(p.grad) for n, p in model.named_parameters()}
        found[name] = largest_difference(got, want)[0]  # type: ignore[arg-type]
    return found


def killed(rank: int, folder: str) -> None:
    """Rank 1 ends in the middle of a backward; what rank 0 then raises goes to a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    model: Any = together(tiny.model(), mesh_of(2), 4)
    own_loss(model, tiny.batch(2, 23)).backward()
    loss = own_loss(model, tiny.batch(2, 23))
    if rank == 1:
        model.lm_head.weight.register_hook(lambda g: os._exit(0))
    try:
        loss.backward()
    except fxmem.FxmemError as raised:
        Path(folder, "error").write_text(f"{type(raised).__name__}: {raised}")
    os._exit(0)  # what is left of the group cannot be taken down in order
