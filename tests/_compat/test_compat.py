"""One small check per private torch name that fxmem uses.

A torch release that moves or changes one of them fails here, with its name.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import sympy
import torch
import torch.utils.checkpoint
from captures import capture, marked
from torch import fx, nn

from fxmem._compat import graph as _compat
from fxmem._compat import tracing, varying
from fxmem._compat.inductor import Symbolic


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
    graph = tracing.make_fx(lambda x: x.sin() + 1)(torch.ones(2)).graph
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.aten.sin.default, torch.ops.aten.add.Tensor]


def test_tree_leaves() -> None:
    assert _compat.tree_leaves({"a": [1, (2,)], "b": 3}) == [1, 2, 3]


def test_restart_capture_traces_the_frame_again() -> None:
    tensor = torch.randn(5, 3)
    symbolic: list[bool] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any], **_: Any) -> Any:
        symbolic.append(any(isinstance(value, torch.SymInt) for value in example_inputs))
        if not symbolic[-1]:
            varying.mark_dynamic(tensor)
            tracing.restart_capture("a test")
        return gm.forward

    torch._dynamo.reset()
    torch.compile(lambda x: x + 1, backend=backend, fullgraph=True)(tensor)
    assert symbolic == [False, True]


def test_a_graph_tells_whether_more_of_its_frame_follows() -> None:
    early: list[bool] = []

    def backend(gm: fx.GraphModule, _: list[Any]) -> Any:
        early.append(tracing.ends_early(gm))
        return gm.forward

    def broken(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        return y + 1 if y.sum() > 0 else y

    torch._dynamo.reset()
    torch.compile(broken, backend=backend)(torch.ones(2))
    assert early == [True, False]


def test_bytes_at_the_sizes_of_the_capture() -> None:
    gm, _ = capture(lambda x: x * 2, marked(9, 4))
    found = [n.meta["example_value"] for n in gm.graph.find_nodes(op="placeholder")]
    assert [_compat.hint_bytes(v) for v in found if isinstance(v, torch.Tensor)] == [9 * 4 * 4]


def test_a_view_is_told() -> None:
    whole = torch.arange(6)
    given = (whole[1:], whole.view(6), whole.view(6).detach(), whole.clone())
    assert [_compat.is_view(t) for t in given] == [True, True, False, False]


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


REGION = torch.compiler.nested_compile_region(lambda x: x.sin() * 2)


def test_bodies_that_may_be_inlined() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(torch.sin, REGION(REGION(x)), use_reentrant=False)

    gm, _ = capture(fn, torch.randn(3, requires_grad=True))
    found = [a for n in gm.graph.nodes if (a := _compat.inlined_operands(n)) is not None]
    assert [[str(n) for n in operands] for operands in found] == [
        ["l_x_"],
        ["getitem"],
        ["getitem_1"],
    ]


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 3


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_a_custom_function_in_a_capture() -> None:
    gm, _ = capture(Custom.apply, torch.randn(3, requires_grad=True))
    (call,) = filter(_compat.is_custom_function, gm.graph.nodes)
    assert [str(a) for a in call.args[2:]] == ["l_args_0_"] or len(call.args) == 3
    assert call.kwargs["non_differentiable_idx"] == []


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_where_function_transforms_begin_and_end() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        y = torch.vmap(torch.sin)(x) + torch.func.grad(lambda z: z.sin().sum())(x)
        return y + torch.func.jvp(torch.sin, (x,), (x,))[1]

    gm, _ = capture(fn, torch.randn(3))
    steps = [s for n in gm.graph.nodes if (s := _compat.transform_step(n))]
    assert steps == [1, -1, 1, -1, 1, -1]
    assert sum(map(_compat.is_forward_mode, gm.graph.nodes)) == 1
    values = [n.meta.get("example_value") for n in gm.graph.nodes]
    assert any(map(_compat.is_transformed, values))
    assert not _compat.is_transformed(torch.ones(2))


def test_no_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        with _compat.no_autocast():
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")


def test_storage_key_tells_views_from_copies() -> None:
    with _compat.FakeTensorMode():
        x = torch.empty(4, 2)
        assert _compat.storage_key(x.view(8)[2:]) == _compat.storage_key(x)
        assert _compat.storage_key(x.clone()) != _compat.storage_key(x)


def test_random_ops_and_arguments_by_name() -> None:
    aten = torch.ops.aten
    for op in (
        aten.rand.default,
        aten.bernoulli_.float,
        aten.random.default,
        aten.binomial.default,
    ):
        assert _compat.is_random(op), op
    for op in (aten.mul.Tensor, aten._fused_sdp_choice.default, torch.rand):
        assert not _compat.is_random(op), op
    given = _compat.named_arguments(aten.randint.low, (1, 5, [3]), {"device": "cpu"})
    assert (given["low"], given["high"], given["size"], given["device"]) == (1, 5, [3], "cpu")
    assert given["layout"] is None


def test_traced_nodes_know_their_origin_and_functional_keeps_it() -> None:
    graph = fx.Graph()
    source = graph.placeholder("x")
    source.meta = {"nn_module_stack": {"a": ("inner", nn.Linear)}, "stack_trace": "here"}

    def fn(x: torch.Tensor) -> torch.Tensor:
        with _compat.origin(source):
            return x.clone().add_(1)

    with _compat.FakeTensorMode() as mode:
        gm = tracing.traced(fn, torch.empty(3))
    assert "aten.add_.Tensor" in [str(n.target) for n in gm.graph.nodes]
    result = tracing.functional(gm, mode)
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
    assert _compat.compiled_call(module)() == "compiled"  # type: ignore[misc]
    assert original(torch.ones(1, 2)).shape == (1, 2)
    assert list(module.state_dict()) == keys
    _compat.unset_compiled_call(module)
    assert _compat.compiled_call(module) is None
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


def test_functions_of_sizes_keep_them_symbolic() -> None:
    sizes = Symbolic.of({"T": 9})
    for name, function in _compat.unary_functions().items():
        assert isinstance(function(0.5 if name in ("acos", "asin") else 4), float), name
    assert _compat.unary_functions()["sqrt"](16) == 4.0
    assert "sqrt" in str(sizes.expr(_compat.unary_functions()["sqrt"](sizes.ints["T"])))


def test_the_python_dispatcher_expands_to_symbolic_sizes() -> None:
    """A meta function that broadcasts: without the dispatcher it asks for concrete sizes."""
    n = sympy.Symbol("T", integer=True)
    sizes = Symbolic.of({"T": 9})
    shape, stride = [n, sympy.Integer(4)], [sympy.Integer(4), sympy.Integer(1)]
    x = sizes.tensor(shape, stride, torch.float32, torch.device("cpu"))
    with sizes.running(), _compat.enable_python_dispatcher():
        out = torch.lerp(x, x, x[0])
    assert sizes.expr(out.shape[0]) == n


def test_assumptions_about_sizes_are_seen_and_taken_over() -> None:
    def hint(length: int) -> tuple[Any, Any]:
        sizes = Symbolic.of({"T": length})
        return sizes, sizes.ints["T"]

    first, length = hint(9)
    assert _compat.size_guards(first.mode) == []
    assert length > 4
    (guard,) = _compat.size_guards(first.mode)
    for value, holds in ((7, True), (3, False)):
        other, length = hint(value)
        mine = guard.xreplace(dict.fromkeys(guard.free_symbols, length.node.expr))
        assert _compat.assume(other.mode, [mine]) is holds
        assert len(_compat.size_guards(other.mode)) == holds
    assert _compat.assume(first.mode, [])
    assert not _compat.assume(first.mode, [sympy.Symbol("unknown") > 3])
