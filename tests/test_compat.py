"""One small check per private torch name that fxmem uses.

A torch release that moves or changes one of them fails here, with its name.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import fx, nn
from torch.profiler import ProfilerActivity, profile

from fxmem import _compat
from fxmem._compat_measure import memory_events
from fxmem._compat_memory import StorageWatch


def capture(fn: Any, *args: torch.Tensor) -> tuple[fx.GraphModule, list[Any]]:
    """Dynamo's graph of a function, with the example inputs that its backend is given."""
    seen: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any], **_: Any) -> Any:
        seen.append((gm, list(example_inputs)))
        return gm.forward

    torch._dynamo.reset()
    with _compat.capture_config():
        torch.compile(fn, backend=backend, fullgraph=True)(*args)
    return seen[-1]


def marked(*shape: int) -> torch.Tensor:
    tensor = torch.randn(*shape)
    _compat.mark_dynamic(tensor)
    return tensor


def test_every_exported_name_exists() -> None:
    assert [name for name in _compat.__all__ if not hasattr(_compat, name)] == []


def test_op_classes() -> None:
    assert isinstance(torch.ops.aten.mm.default, _compat.OpOverload)
    assert torch.ops.aten.mm.default._schema.is_mutable is False
    assert torch.ops.aten.add_.Tensor._schema.is_mutable is True
    assert issubclass(type(torch.ops.higher_order.cond), _compat.HigherOrderOperator)


def test_fake_tensors_hold_no_data_and_make_fx_traces_them() -> None:
    with _compat.FakeTensorMode() as mode:
        fake = torch.empty(2**20, 2**20)
    assert isinstance(fake, _compat.FakeTensor)
    assert fake.fake_mode is mode
    graph = _compat.make_fx(lambda x: x.sin() + 1)(torch.ones(2)).graph
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.aten.sin.default, torch.ops.aten.add.Tensor]


def test_tree_leaves() -> None:
    assert _compat.tree_leaves({"a": [1, (2,)], "b": 3}) == [1, 2, 3]


def test_mark_dynamic_gives_symbolic_sizes_and_says_what_is_new() -> None:
    tensor = torch.randn(1, 7, 3)
    assert _compat.mark_dynamic(tensor) is True
    assert _compat.mark_dynamic(tensor) is False
    assert tensor._dynamo_weak_dynamic_indices == {1, 2}
    _, inputs = capture(lambda x: x * 2, tensor)
    assert sum(isinstance(value, torch.SymInt) for value in inputs) == 2


def test_restart_capture_traces_the_frame_again() -> None:
    tensor = torch.randn(5, 3)
    symbolic: list[bool] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any], **_: Any) -> Any:
        symbolic.append(any(isinstance(value, torch.SymInt) for value in example_inputs))
        if not symbolic[-1]:
            _compat.mark_dynamic(tensor)
            _compat.restart_capture("a test")
        return gm.forward

    torch._dynamo.reset()
    torch.compile(lambda x: x + 1, backend=backend, fullgraph=True)(tensor)
    assert symbolic == [False, True]


def test_dynamic_inputs_leave_out_parameters_and_buffers() -> None:
    module, given = nn.BatchNorm1d(4).eval(), torch.randn(3, 4)
    seen: list[list[torch.Size]] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        # Asked in here: Dynamo forgets where inputs came from when the backend returns.
        assert len(example_inputs) == 5
        seen.append([t.shape for t in _compat.dynamic_inputs(gm, example_inputs)])
        return gm.forward

    torch._dynamo.reset()
    torch.compile(module, backend=backend, fullgraph=True)(given)
    assert seen == [[given.shape]]


def test_unify_sizes_makes_equal_lengths_one_symbol() -> None:
    gm, _ = capture(lambda x, y: (x * 2, y * 2), marked(9, 4), marked(9, 4))
    values = [n.meta["example_value"] for n in gm.graph.find_nodes(op="placeholder")]
    x, y = (v for v in values if isinstance(v, torch.Tensor))
    assert x.shape[0].node.expr != y.shape[0].node.expr
    _compat.unify_sizes(gm)
    assert x.shape[0].node.expr == y.shape[0].node.expr


def test_fake_mode_of_a_capture() -> None:
    gm, _ = capture(lambda x: x * 2, torch.randn(3))
    assert isinstance(_compat.fake_mode_of(gm), _compat.FakeTensorMode)
    assert _compat.fake_mode_of(fx.symbolic_trace(nn.ReLU())) is None


def test_a_checkpoint_in_a_capture() -> None:
    def body(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    def fn(x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(body, x, use_reentrant=False)

    gm, _ = capture(fn, torch.randn(3, requires_grad=True))
    assert sum(map(_compat.is_checkpoint, gm.graph.nodes)) == 1


def test_storage_key_tells_views_from_copies() -> None:
    with _compat.FakeTensorMode():
        x = torch.empty(4, 2)
        assert _compat.storage_key(x.view(8)[2:]) == _compat.storage_key(x)
        assert _compat.storage_key(x.clone()) != _compat.storage_key(x)


def test_traced_nodes_know_their_origin_and_functional_keeps_it() -> None:
    graph = fx.Graph()
    source = graph.placeholder("x")
    source.meta = {"nn_module_stack": {"a": ("inner", nn.Linear)}, "stack_trace": "here"}

    def fn(x: torch.Tensor) -> torch.Tensor:
        with _compat.origin(source):
            return x.clone().add_(1)

    with _compat.FakeTensorMode() as mode:
        gm = _compat.traced(fn, torch.empty(3))
    assert "aten.add_.Tensor" in [str(n.target) for n in gm.graph.nodes]
    result = _compat.functional(gm, mode)
    calls = [n for n in result.graph.nodes if n.op == "call_function"]
    assert not any(n.target._schema.is_mutable for n in calls)
    assert all(n.meta["nn_module_stack"] == {"a": ("inner", nn.Linear)} for n in calls)
    assert all(n.meta["stack_trace"] == "here" for n in calls)


def test_capture_config_skips_loggers_and_keeps_floats_constant() -> None:
    logger = logging.getLogger("fxmem.tests.compat")

    def logs(x: torch.Tensor) -> torch.Tensor:
        logger.warning("not traced")
        return x * 2

    gm, _ = capture(logs, torch.randn(3))
    assert len(gm.graph.find_nodes(op="placeholder")) == 1
    with _compat.capture_config():
        assert torch._dynamo.config.specialize_float is True


def test_a_graph_break_raises_dynamos_exception() -> None:
    def breaks(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x

    with pytest.raises(_compat.TorchDynamoException):
        capture(breaks, torch.randn(3))


def test_backend_errors_are_wrapped() -> None:
    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        raise ValueError("from the backend")

    torch._dynamo.reset()
    with pytest.raises(_compat.TorchDynamoException, match="from the backend"):
        torch.compile(lambda x: x + 1, backend=backend)(torch.randn(3))


def test_control_nodes_of_a_capture() -> None:
    def switches(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = x * 2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ y

    gm, _ = capture(switches, torch.randn(3, 3, requires_grad=True))
    kinds = [kind for n in gm.graph.nodes if (kind := _compat.is_control_node(n)) is not None]
    assert kinds == ["grad", "grad", "enter", "exit"]


def test_log_nodes_are_control_nodes() -> None:
    graph = fx.Graph()
    assert _compat.is_control_node(graph.call_function(torch._C._log_api_usage_once)) == "log"
    assert _compat.is_control_node(graph.call_function(torch.sin)) is None
    assert _compat.is_control_node(graph.placeholder("x")) is None


def test_a_compiled_call_replaces_call_and_nothing_else() -> None:
    module = nn.Linear(2, 2)
    original, keys = _compat.call_impl(module), list(module.state_dict())
    _compat.set_compiled_call(module, lambda *_: "compiled")
    assert module(torch.ones(1, 2)) == "compiled"
    assert original(torch.ones(1, 2)).shape == (1, 2)
    assert list(module.state_dict()) == keys
    _compat.unset_compiled_call(module)
    assert module(torch.ones(1, 2)).shape == (1, 2)


def test_call_impl_runs_hooks() -> None:
    module, ran = nn.Linear(2, 2), []
    module.register_forward_hook(lambda *_: ran.append(True))
    _compat.call_impl(module)(torch.ones(1, 2))
    assert ran == [True]


def test_ambient_autocast_enters_and_leaves() -> None:
    with _compat.ambient_autocast([("cpu", torch.bfloat16, True)]):
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_autocast_cache_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_compile_times_grow_with_a_capture() -> None:
    torch._dynamo.reset()
    before = _compat.compile_times()
    capture(lambda x: x.cos() * 3, torch.randn(3))
    assert _compat.compile_times() > before


def test_wrapper_tensor_has_metadata_without_storage() -> None:
    class Empty(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, *_: Any) -> Any:
            raise NotImplementedError

    tensor = _compat.wrapper_tensor(Empty, (2**20, 2**20), torch.bfloat16, torch.device("cpu"))
    assert isinstance(tensor, Empty)
    assert (tuple(tensor.shape), tensor.dtype) == ((2**20, 2**20), torch.bfloat16)


def test_memory_events_see_an_allocation_and_its_free() -> None:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as done:
        tensor = torch.empty(12345, dtype=torch.uint8)
        del tensor
    sizes = [size for _, size, device in memory_events(done) if device == "cpu"]
    assert max(sizes) >= 12345
    assert sum(sizes) == 0


def test_memory_events_leave_out_frees_of_what_an_earlier_profile_saw() -> None:
    kept = []
    for _ in range(2):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as done:
            kept.clear()
            kept.append(torch.empty(12345, dtype=torch.uint8))
        sizes = [size for _, size, device in memory_events(done) if device == "cpu"]
        assert sum(sizes) >= 12345 and min(sizes) >= 0


def test_memory_events_refuse_a_profile_that_did_not_run() -> None:
    with pytest.raises(RuntimeError, match="no recorded events"):
        list(memory_events(profile()))


def test_storage_watch_counts_storages_that_live() -> None:
    with _compat.FakeTensorMode():
        before = torch.empty(10)
        watch = StorageWatch()
        watch.ignore([before])
        with watch:
            kept = before * 2
            kept.view(2, 5)
            dropped = torch.empty(1000)
            del dropped
            before.add_(1)
    assert watch.settle() == kept.untyped_storage().nbytes() == 40
    assert watch.peak == 4040
    assert watch.owner(kept)[1] == 40
    assert watch.owner(before)[1] == 0


def test_storage_watch_asks_what_an_op_needs_inside() -> None:
    with _compat.FakeTensorMode(), StorageWatch(lambda op, args: 7) as watch:
        torch.empty(1)
    assert watch.peak == 11


def test_mark_axis_dynamic_makes_one_axis_symbolic() -> None:
    seen: list[torch.Size] = []

    def record(gm: torch.fx.GraphModule, inputs: list[object]) -> object:
        seen.extend(
            n.meta["example_value"].shape for n in gm.graph.nodes
            if n.op == "placeholder" and isinstance(n.meta["example_value"], torch.Tensor)
        )  # fmt: skip
        return gm.forward

    tensor = torch.ones(4, 6)
    _compat.mark_axis_dynamic(tensor, 1)
    torch.compile(lambda t: t * 2, backend=record)(tensor)
    assert [isinstance(n, torch.SymInt) for n in seen[0]] == [False, True]


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


def test_no_ddp_module_runs() -> None:
    # one that runs is in test_blocks_processes
    assert not _compat.inside_ddp()
