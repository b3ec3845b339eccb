"""What each rank of the tests of ``fully_shard`` runs; spawned processes import it by name."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import tiny
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from sharded import WAYS, by_layer, counted, inputs, state, steps, stream
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

import fxmem
from fxmem import api
from fxmem.measure.live import peak_bytes
from fxmem.memory.predict import predict

Way = Callable[[nn.Module], None]


def both(
    name: str, shard: Way, chunk: int = 9, order: str = "after", **options: Any
) -> tuple[Any, Any]:
    """A plain and a streamed model, sharded alike."""
    plain, model = tiny.model(name).double(), tiny.model(name).double()
    shard(plain)
    if order == "before":
        stream(model, chunk, **options)
    shard(model)
    if order == "after":
        stream(model, chunk, **options)
    return plain, model


def ran(model: nn.Module) -> int:
    return fxmem.explain(model).executed_bodies


def two_steps(rank: int, name: str, way: str, order: str) -> Any:
    """Results, collectives, and chunks that ran."""
    found = []
    plain, model = both(name, WAYS[way], order=order)
    for net in (plain, model):
        with counted() as collectives:
            result = steps(net, [inputs(rank), inputs(rank, 1)])
        found.append((result, dict(collectives)))
    return found, ran(model)


def chunks_of_a_step(rank: int, chunk: int, options: dict[str, Any]) -> Any:
    plain, model = both("llama", by_layer, chunk, **options)
    found = []
    for net in (plain, model):
        with counted() as collectives:
            found.append((steps(net, [inputs(rank)]), dict(collectives)))
    return found


def smoothed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A loss outside the model, on logits that nobody makes whole."""
    given = {k: v for k, v in batch.items() if k != "labels"}
    logits = model(**given).logits[:, :-1].flatten(0, 1)
    labels = batch["labels"][:, 1:].flatten()
    return F.cross_entropy(logits, labels, ignore_index=-100, label_smoothing=0.1)


def field(rank: int) -> Any:
    """What happens around a step: evaluation, sums of steps, a loss outside, a short rank."""
    plain, model = both("llama", by_layer)
    found = []
    for net in (plain, model):
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        results: list[Any] = []
        with counted() as collectives:
            for i in range(3):  # accumulation: one reduction per group at the end
                net.set_requires_gradient_sync(i == 2)
                net(**inputs(rank, i)).loss.backward()
            reductions = collectives["reductions"]
        results.append(state(net))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            results.append(net(**inputs(rank)).loss.item())
        first, second = (net(**inputs(rank, i)).loss for i in (3, 4))
        (first + second).backward()  # two forwards, one backward
        results.append(state(net))
        optimizer.zero_grad()
        if rank:
            net(input_ids=inputs(rank)["input_ids"][:, :1]).logits.square().mean().backward()
        else:
            net(**inputs(rank)).loss.backward()
        results.append(state(net))  # rank 1 has one token and runs plain
        optimizer.zero_grad()
        smoothed(net, inputs(rank)).backward()
        results.append(state(net))
        found.append((results, reductions))
    return found, ran(model)


def policies(rank: int) -> Any:
    """Options of fully_shard: one result of plain and streamed for each."""
    found = {}
    ways: dict[str, Way] = {
        "open": lambda m: by_layer(m, reshard_after_forward=False),
        "offload": lambda m: by_layer(m, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    }
    for name, way in ways.items():
        results = []
        for net in both("llama", way):
            with counted() as collectives:
                results.append((steps(net, [inputs(rank), inputs(rank, 1)]), dict(collectives)))
        found[name] = results
    return found


def failing(rank: int) -> Any:
    """All ranks fail in the middle of a forward, then of a backward; the next step is as plain."""
    plain, model = both("llama", by_layer)
    outcomes = []
    stream_of = model.model.layers[1]
    broken = stream_of.register_forward_pre_hook(_raise)
    for _ in range(2):
        try:
            model(**inputs(rank)).loss.backward()
        except (ZeroDivisionError, fxmem.FxmemError):
            outcomes.append("forward")
    broken.remove()
    weight = stream_of.mlp.up_proj.weight
    watched = weight.register_post_accumulate_grad_hook(_raise)
    try:
        model(**inputs(rank)).loss.backward()
    except ZeroDivisionError:
        outcomes.append("backward")
    watched.remove()
    model.zero_grad()
    return outcomes, [steps(net, [inputs(rank)]) for net in (plain, model)]


def _raise(*_: Any) -> None:
    raise ZeroDivisionError


def refused(rank: int) -> Any:
    """The first call under something that cannot work names it, before any collective."""
    messages = []
    for way in (_parts_only, _tensor_parallel, _replicated, _fsdp1, _zero3):
        model: Any = tiny.model().double()
        stream(model, 9)
        model = way(model)
        with counted() as collectives:
            try:
                model(**inputs(rank)).loss.backward()
                messages.append("no error")
            except fxmem.FxmemError as error:
                messages.append(f"{type(error).__name__}: {error}")
        messages.append(str(collectives.total()))
    return messages


def _parts_only(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    return model


def _tensor_parallel(model: Any) -> Any:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    plan = {f"model.layers.{i}.mlp.up_proj": ColwiseParallel() for i in range(2)}
    return parallelize_module(model, mesh, plan)


def _replicated(model: Any) -> Any:
    from torch.distributed._composable.replicate import replicate

    return replicate(model)


def _fsdp1(model: Any) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    layers = model.model.layers
    for i in range(2):
        layers[i] = FullyShardedDataParallel(layers[i], device_id=torch.device("cpu"))
    return model


def _zero3(model: Any) -> Any:
    """The mark that DeepSpeed leaves on parameters that it has partitioned."""
    sys.modules.setdefault("deepspeed", ModuleType("deepspeed"))
    for p in model.parameters():
        p.ds_status = "NOT_AVAILABLE"
    return model


def checkpointed(rank: int, folder: str) -> list[bool]:
    """Saved by a streamed model, loaded by a plain one, and back: whether weights are bit-equal."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    plain, model = both("llama", by_layer)
    steps(model, [inputs(rank)])
    equal = []
    for source, target, name in ((model, plain, "a"), (plain, model, "b")):
        before = copy.deepcopy(state(source))
        dcp.save(get_model_state_dict(source), checkpoint_id=f"{folder}/{name}")
        for p in target.parameters():
            p.data.zero_()
        kept = get_model_state_dict(target)
        dcp.load(kept, checkpoint_id=f"{folder}/{name}")
        set_model_state_dict(target, kept)
        after = state(target)
        weights = [k for k in before if not k.endswith(".grad")]
        equal += [torch.equal(before[k], after[k]) for k in weights]
        steps(target, [inputs(rank)])
        dist.barrier()
    return equal


def narrow(rank: int) -> Any:
    """Errors of gradients against float64: of plain bfloat16, and of streamed."""
    exact = tiny.model().double()
    by_layer(exact)
    want = steps(exact, [inputs(rank)])[1]
    errors = []
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for streamed in (False, True):
        net = tiny.model()
        by_layer(net, mp_policy=policy)
        if streamed:
            stream(net, 9)
        got = steps(net, [inputs(rank)])[1]
        grads = [k for k in want if k.endswith(".grad")]
        errors.append(sum(float((got[k] - want[k]).norm()) ** 2 for k in grads) ** 0.5)
    return errors


def large() -> Any:
    """A model whose layers are larger than what a peak may be off by."""
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=1024, max_position_embeddings=4096, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).train()


def predicted(rank: int, options: dict[str, Any], stay: bool) -> tuple[float, float, list[str]]:
    """Predicted and measured peak of a step, in bytes, and the moments of the former."""
    model = large()
    by_layer(model, **({"reshard_after_forward": False} if stay else {}))
    stream(model, 64, **options)
    ids = torch.randint(1024, (1, 640 - 64 * rank))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    step()
    peaks = []
    for _ in range(4):  # a thread of gloo may let go of a buffer late
        model.zero_grad()
        peaks.append(peak_bytes(step))
    measured = min(peaks)
    graph = api._TRANSFORMED[model].graphs[-1]
    found = predict(graph, graph.sizes)
    return found.peak_bytes, measured, [f"{label}: {size}" for label, size in found.timeline]
