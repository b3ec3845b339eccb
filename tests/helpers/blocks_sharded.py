"""Block training under ``fully_shard``: what each rank of the tests runs."""

from __future__ import annotations

import contextlib
from typing import Any

import tiny
import torch
import torch.distributed.checkpoint as dcp
from blocks_cases import STREAM, Small, ids, small
from sharded import WAYS, by_layer, counted, inputs
from sharded_runs import large, smoothed
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import fxmem
from fxmem import SGD, BlockAdamW, Blocks, LowRank, Plan, SignSGD, Stream, api
from fxmem._compat import fsdp as _compat
from fxmem.blocks.attach import state_of
from fxmem.blocks.move import move
from fxmem.blocks.shards import first_element, local
from fxmem.measure.live import peak_bytes
from fxmem.memory.predict_roles import predict_roles

KINDS: dict[str, dict[str, Any]] = {
    "badam": {"inactive": None},
    "sgd": {"inactive": SGD(0.1)},
    "all": {"inactive": SGD(0.1), "reach": "all", "outer": "blocks"},
    "sign": {"inactive": SignSGD(1e-2), "reach": "all"},
    "per tensor": {"inactive": SGD(0.1), "reach": "all", "clip": "per_tensor", "clip_norm": 0.01},
    "delayed": {"inactive": SGD(0.1), "reach": "all", "clip": "delayed", "clip_norm": 0.01},
    "micro": {"inactive": SGD(0.1), "reach": "all", "accumulation": "micro", "micro_batches": 1},
    "accumulate": {"inactive": SignSGD(1e-2), "accumulation": "accumulate"},
    "low_rank": {"inactive": LowRank(rank=2), "reach": "all", "always_active": ("norm",)},
}
RESUMED = {"inactive": SGD(0.1), "reach": "all", "steps": 4, "always_active": ("norm",)}
LENGTHS = ((12, 3), (4, 31), (11, 17), (2, 5), (9, 9))
"""Of both ranks at each step: one chunk and several."""


def shard(net: Small, **options: Any) -> None:
    for layer in net.layers:
        fully_shard(layer, **options)
    fully_shard(net, **options)


def make(
    world: int, order: str = "after", plan: Any = None, dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[Small, BlockAdamW, Any]:  # fmt: skip
    net = small(dtype=dtype)
    if world > 1 and order == "after":
        shard(net, **options)
    fxmem.transform(net, Plan(stream=STREAM, blocks=Blocks(**{"steps": 2, **(plan or {})})))
    if world > 1 and order == "before":
        shard(net, **options)
    return net, BlockAdamW(net, lr=0.01, max_grad_norm=0.5), state_of(net)


def whole(value: Tensor) -> Tensor:
    found: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return found.detach().clone()


def values(net: nn.Module, state: Any) -> list[Tensor]:
    terms = [t for a in state.adapters.values() for t in (a.up, a.down)]
    return [whole(t) for t in (*net.parameters(), *terms)]


def train(net: Any, opt: Any, rank: int, world: int, steps: range, accumulate: bool) -> None:
    for step in steps:
        for part in range(1 + accumulate):
            losses = [net(ids(10 * step + i + 5 * part, 2, n)) for i, n in enumerate(LENGTHS[step])
                      if world == 1 or i == rank]  # fmt: skip
            torch.stack(losses).mean().backward()
        opt.step()
        net.zero_grad()


def trained(rank: int, world: int, kind: str, order: str = "after") -> list[Tensor]:
    net, opt, state = make(world, order, KINDS[kind])
    train(net, opt, rank, world, range(len(LENGTHS)), "accumulate" in kind)
    return values(net, state)


def kinds_of(rank: int, order: str, kinds: list[str]) -> dict[str, list[Tensor]]:
    return {kind: trained(rank, 2, kind, order) for kind in kinds}


def around(rank: int, world: int = 2, *, busy: bool = False) -> list[Tensor]:
    """Three forwards per step, of which one waits unreduced and two share a backward; ``busy``:
    with what must change nothing between them.
    """
    net, opt, state = make(world, plan={"inactive": SGD(0.1), "reach": "all"})
    ranks = [rank] if world > 1 else [0, 1]
    for step in range(4):
        if busy:
            with torch.no_grad():
                net(ids(99, 2, 7))
            net.eval()
            net(ids(98, 2, 7)).backward()  # updates nothing
            net.train()
            net.zero_grad()
        if world > 1:
            net.set_requires_gradient_sync(False)  # type: ignore[operator]
            net(ids(step, 2, 5 + rank)).backward()
            net.set_requires_gradient_sync(True)  # type: ignore[operator]
        more = [net(ids(step + 10 * i, 2, 3 + 4 * r)) for i in (1, 2) for r in ranks]
        if world == 1:
            more += [net(ids(step, 2, 5 + r)) for r in ranks]
        (torch.stack(more).sum() / len(ranks)).backward()
        if busy:
            with contextlib.suppress(fxmem.FxmemError):
                net(ids(97, 2, 9))
        opt.step()
        net.zero_grad()
    return values(net, state)


def evaluated(rank: int, world: int, order: str) -> list[Tensor]:
    """A loss without gradients and then with, of unequal lengths, at several steps."""
    net, opt, _ = make(world, order, KINDS["low_rank"])
    found = []
    for step in range(3):
        if step != 1:
            train(net, opt, rank, world, range(step, step + 1), False)
        for seed, length in ((7, 9 + rank), (8, 2)):
            with torch.no_grad():
                found.append(whole(net(ids(seed, 2, length))))
            net.eval()
            with torch.enable_grad():
                found.append(whole(net(ids(seed, 2, length))))
            net.train()
            opt.zero_grad()
    return found


def busy(rank: int) -> tuple[list[Tensor], list[Tensor]]:
    return around(rank), around(rank, busy=True)


def save(rank: int, world: int, folder: str, first: int, **options: Any) -> list[Tensor]:
    """Train, save in the middle of a visit, go on to the end."""
    net, opt, state = make(world, plan=RESUMED, **options)
    train(net, opt, rank, world, range(first), False)
    dcp.save(
        {"model": get_model_state_dict(net), "optimizer": opt.state_dict()}, checkpoint_id=folder
    )
    train(net, opt, rank, world, range(first, len(LENGTHS)), False)
    return values(net, state)


def resume(rank: int, world: int, folder: str, first: int, **options: Any) -> list[Tensor]:
    """The end of the run that :func:`save` began, on as many ranks or not."""
    net, opt, state = make(world, plan=RESUMED, **options)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    begun = {"optimizer": {"blocks": opt.state_dict()["blocks"]}}
    dcp.load(begun, checkpoint_id=folder)
    saved = {
        "model": get_model_state_dict(net),
        "optimizer": opt.blank_state_dict(begun["optimizer"]["blocks"]),
    }
    dcp.load(saved, checkpoint_id=folder)
    set_model_state_dict(net, saved["model"])
    opt.load_state_dict(saved["optimizer"])
    train(net, opt, rank, world, range(first, len(LENGTHS)), False)
    return values(net, state)


def saved_and_resumed(rank: int, folder: str, first: int) -> Any:
    whole = save(rank, 2, f"{folder}/bf16", first, dtype=torch.bfloat16)
    again = resume(rank, 2, f"{folder}/bf16", first, dtype=torch.bfloat16)
    here = save(rank, 2, f"{folder}/two", first)
    from_one = resume(rank, 2, f"{folder}/one", first)
    return whole, again, here, from_one


def poisoned(rank: int) -> Any:
    """One entry of one reduced gradient is infinite, on one rank: what moved since, by name."""
    net, opt, state = make(2, plan={"inactive": SGD(0.1), "reach": "all", "order": "ascending"})
    weight = net.layers[1].up.weight

    def spoil(p: Tensor) -> None:
        if rank == 1:
            p.grad.to_local().view(-1)[0] = float("inf")  # type: ignore[union-attr]

    hook = weight.register_post_accumulate_grad_hook(spoil)
    before = {n: whole(p) for n, p in net.named_parameters()}
    train(net, opt, rank, 2, range(1), False)
    hook.remove()
    after = {n: whole(p) for n, p in net.named_parameters()}
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    train(net, opt, rank, 2, range(1, 2), False)
    return moved, values(net, state)


def gradients_left(rank: int) -> Any:
    """Bytes of gradients, whole and reduced, that are left of inactive parameters after each
    reduction of a group; and the collectives of a step.
    """
    net, opt, state = make(2, plan={"inactive": SGD(0.1), "reach": "all", "order": "ascending"})
    left: list[int] = []
    reduce = _compat.Group.reduce

    def seen(group: Any) -> None:
        reduce(group)
        pairs = [pair for m in net.layers for pair in _compat.group_of(m, {}).whole()]
        left.append(
            sum(t.grad.nbytes for p, shard in pairs if state.names[shard] not in state.active
                for t in (p, shard) if t.grad is not None)
        )  # fmt: skip

    _compat.Group.reduce = seen  # type: ignore[method-assign]
    with counted() as collectives:
        train(net, opt, rank, 2, range(1), False)
    _compat.Group.reduce = reduce  # type: ignore[method-assign]
    return left, dict(collectives)


def rounded(rank: int) -> Any:
    """bfloat16 weights, of a gradient that no summation changes: rows are divided over the ranks,
    or not.
    """
    made = []
    for shape in ((7, 6), (5,), (1, 3)):
        p, g = (torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
        one = p.to(torch.bfloat16)
        two = distribute_tensor(one.clone(), init_device_mesh("cpu", (2,)), [Shard(0)])
        part = distribute_tensor(g, two.device_mesh, [Shard(0)])
        move(one, g, 1e-4, 1.0, bits=9)
        move(local(two), local(part), 1e-4, 1.0, bits=9, first=first_element(two))
        made.append(torch.equal(one, whole(two)))
    return made


def ignored(rank: int) -> str:
    net = small()
    shard(net, ignored_params={net.head.weight})
    try:
        fxmem.transform(net, Plan(blocks=Blocks(inactive=SGD(0.1))))
    except fxmem.PlanError as error:
        return str(error)
    return ""


def inside(net: Any, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = net(**batch).loss
    return loss


SUMS: dict[str, Any] = {"inactive": SGD(0.1), "reach": "all", "accumulation": "accumulate"}
CASES: list[tuple[str, str, str, dict[str, Any], Any]] = [
    ("qwen2", "accelerate", "after", {"inactive": SGD(0.1), "reach": "all"}, inside),
    ("qwen3_moe", "layers", "after", {"inactive": SGD(0.1), "guard": False}, inside),
    ("llama", "head", "before", {"inactive": LowRank(rank=2), "reach": "all"}, smoothed),
    ("qwen2", "layers", "before", SUMS, smoothed),
]
"""The last two have a loss outside the model."""


def trained_model(
    rank: int, world: int, name: str, way: str, order: str, plan: Any, loss: Any
) -> tuple[list[Tensor], list[dict[str, int]]]:
    """Three visits of one step; and what is sent in each."""
    net: Any = tiny.model(name).double()
    if world > 1 and order == "after":
        WAYS[way](net)
    fxmem.transform(net, Plan(stream=Stream(chunk=9), blocks=Blocks(steps=1, **plan)))
    if world > 1 and order == "before":
        WAYS[way](net)
    opt, sent = BlockAdamW(net, lr=1e-2), []
    for step in range(3):
        with counted() as collectives:
            losses = [loss(net, inputs(r, step)) for r in range(2) if world == 1 or r == rank]
            torch.stack(losses).mean().backward()
            opt.step()
            opt.zero_grad()
        sent.append(dict(collectives))
    return values(net, state_of(net)), sent


def models_of(rank: int, cases: list[Any]) -> list[Any]:
    return [trained_model(rank, 2, *case) for case in cases]


def options(rank: int) -> dict[str, list[Tensor]]:
    """Options of fully_shard, one of them dividing columns."""
    ways: dict[str, dict[str, Any]] = {
        "open": {"reshard_after_forward": False},
        "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        "columns": {"shard_placement_fn": lambda p: Shard(int(p.ndim == 2 and not p.shape[1] % 2))},
    }
    found = {}
    for name, way in ways.items():
        net, opt, state = make(2, plan=KINDS["per tensor"], **way)
        train(net, opt, rank, 2, range(len(LENGTHS)), False)
        found[name] = values(net, state)
    return found


def hybrid(rank: int) -> dict[str, list[Tensor]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    found = {}
    for kind in ("per tensor", "low_rank", "accumulate"):
        net, opt, state = make(2, plan=KINDS[kind], mesh=mesh)
        train(net, opt, rank % 2, 2, range(len(LENGTHS)), kind == "accumulate")
        found[kind] = values(net, state)
    return found


PREDICTED: list[tuple[dict[str, Any], bool]] = [
    ({"inactive": SGD(1e-3), "reach": "all", "order": "ascending"}, False),
    ({"inactive": SGD(1e-3), "outer": "blocks", "order": "descending"}, True),
]


def predicted(rank: int) -> list[tuple[float, float]]:
    """Predicted and measured peaks of a step, in bytes."""
    return [_predicted(rank, *case) for case in PREDICTED]


def _predicted(rank: int, plan: dict[str, Any], stay: bool) -> tuple[float, float]:
    model = large()
    by_layer(model, **({"reshard_after_forward": False} if stay else {}))
    fxmem.transform(model, Plan(stream=Stream(chunk=64), blocks=Blocks(**plan)))
    opt = BlockAdamW(model)
    given = torch.randint(1024, (1, 640 - 64 * rank))

    def step() -> None:
        model(input_ids=given, labels=given).loss.backward()

    peaks = []
    for _ in range(5):  # a thread of gloo may let go of a buffer late
        opt.zero_grad()
        peaks.append(peak_bytes(step))
        opt.step()
    graph = api._TRANSFORMED[model].graphs[-1]
    return predict_roles(graph, graph.sizes).peak_bytes, min(peaks[1:])
