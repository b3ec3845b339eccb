"""The registry: signatures, availability with reasons, references without Triton, compilation for
GPUs that are not there.
"""

from __future__ import annotations

import inspect
import subprocess
import sys

import benchmarks_package  # noqa: F401
import pytest
import torch
from torch import Tensor

from fxmem.kernels._triton import config, recording
from fxmem.kernels.kernel import Cost, Kernel, signature, unify
from fxmem.kernels.registry import find, kernels, lookup
from fxmem.rules import TABLE

KERNELS = kernels()
NAMES = [kernel.name for kernel in KERNELS]


@pytest.fixture(params=KERNELS, ids=NAMES)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return request.param


def test_names_are_unique() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert find("adamw").name == "adamw"
    with pytest.raises(KeyError, match="there are chunk_attention"):
        find("nothing")


def test_reference_and_launcher_take_the_same_arguments(kernel: Kernel) -> None:
    assert inspect.signature(kernel.reference) == inspect.signature(kernel.launch)
    for function in (kernel.reference, kernel.launch):
        assert function.__doc__


def test_signature_has_an_entry_per_tensor_operand(kernel: Kernel) -> None:
    parameters = inspect.signature(kernel.reference).parameters.values()
    named = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert all("Tensor" in p.annotation for p in named)
    operands = [p.name for p in named if p.name not in kernel.accumulators]
    assert len(operands) == len(kernel.signature.ins)
    for sample in kernel.samples if kernel.name != "adamw" else ():
        given = dict(zip([p.name for p in named], sample.arguments()[0], strict=False))
        for name, dims in zip(operands, kernel.signature.ins, strict=True):
            if isinstance(given.get(name), Tensor):
                assert given[name].dim() == len(dims)
    letters = {letter for dims in kernel.signature.ins for dim in dims for letter in dim}
    assert kernel.signature.whole <= letters


def test_operators_exist(kernel: Kernel) -> None:
    for name in kernel.ops:
        namespace, op, overload = name.split(".")
        assert name in TABLE or hasattr(getattr(getattr(torch.ops, namespace), op), overload)


def test_a_device_without_triton_has_a_reason(kernel: Kernel) -> None:
    found = kernel.available("cpu", torch.float32)
    assert not found and "cpu" in found.reason
    wrong = kernel.available("cuda", torch.int8)
    assert not wrong and "int8" in wrong.reason
    assert kernel.available("cuda", torch.float32), "Triton is installed and cuda is its device"


def test_a_call_on_the_cpu_runs_the_reference() -> None:
    acc, dy, x = torch.ones(3, 4), torch.randn(5, 3), torch.randn(5, 4)
    assert find("weight_grad")(acc, dy, x) is acc
    torch.testing.assert_close(acc, 1 + dy.t() @ x)


def test_unify_renames_letters() -> None:
    pattern = signature("n d, v d -> n v", "d")
    assert unify(pattern, signature("a b, c b -> a c")) == {"n": "a", "d": "b", "v": "c"}
    assert unify(pattern, signature("a b, b c -> a c")) is None, "another operand order"
    assert unify(pattern, signature("a a, c a -> a c")) is None, "two letters became one"
    assert unify(pattern, signature("a b, c b -> a c, a")) is None, "more results"
    assert unify(pattern, signature("a b, c b -> a c", "a")) is None, "a must be whole"
    assert unify(pattern, signature("a 1, c b -> a c")) is None, "another rank of atoms"
    assert unify(signature("a b -> a b"), signature("1 b -> 1 b")) is None


def test_lookup_by_operator_and_signature() -> None:
    from fxmem.axes.signature import Call, TensorInfo
    from fxmem.axes.sizes import T

    def info(*shape: object) -> TensorInfo:
        return TensorInfo(tuple(shape), torch.float32)  # type: ignore[arg-type]

    q, kv = info(2, 8, T, 16), info(2, 2, T, 16)
    args = (q, kv, kv, None, True, 0.25)
    call = Call("fxmem.attention.default", args, {}, (q, info(2, 8, T)))
    rule = TABLE["fxmem.attention.default"].rule(call)
    assert [k.name for k in lookup("fxmem.attention.default", rule)] == ["chunk_attention"]
    assert not lookup("fxmem.attention.default", signature("m k, k n -> m n"))
    assert not lookup("aten.sort.default")


def test_attention_backward_unifies_with_its_row() -> None:
    from fxmem.axes.signature import Call, TensorInfo
    from fxmem.axes.sizes import T

    q, kv = (TensorInfo((2, n, T, 16), torch.float32) for n in (8, 2))
    lse = TensorInfo((2, 8, T), torch.float32)
    args = (q, q, kv, kv, q, lse, None, True, 0.25)
    call = Call("fxmem.attention_backward.default", args, {}, (q, kv, kv))
    rule = TABLE["fxmem.attention_backward.default"].rule(call)
    found = lookup("fxmem.attention_backward.default", rule)
    assert [k.name for k in found] == ["chunk_attention_backward"]


def test_everything_imports_and_runs_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None  # any import of it now fails
import torch
from fxmem.kernels.registry import find, kernels
for kernel in kernels():
    assert "not installed" in kernel.available("cuda", torch.float32).reason
x, w = torch.randn(6, 8), torch.randn(20, 8)
find("norm")(x, torch.ones(8), eps=1e-6)
find("linear_nll")(x, w, None, torch.zeros(6, 1, dtype=torch.int64))
q = torch.randn(1, 2, 6, 8)
find("chunk_attention")(q, q, q, scale=0.3)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("vocabulary", (3_000, 30_000))
def test_head_memory_does_not_grow_with_the_vocabulary(
    vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference, forward and backward: the weight's gradient aside, only tiles are alive."""
    from fxmem.kernels import linear_nll, linear_nll_backward
    from fxmem.measure.live import peak_bytes

    monkeypatch.setattr(linear_nll, "TILE", 512)
    monkeypatch.setattr(linear_nll_backward, "TILE", 512)
    h, weight = torch.randn(64, 8), torch.randn(vocabulary, 8)
    target, dw = torch.randint(vocabulary, (64, 1)), torch.zeros(vocabulary, 8)

    def step() -> None:
        logp, entropy, lse, _ = linear_nll.reference(h, weight, None, target)
        linear_nll_backward.reference(
            h, weight, None, target, entropy, lse, torch.ones_like(logp), dweight=dw
        )

    assert peak_bytes(step) < 8 * 64 * 512 * 4


def test_launches_are_recorded_not_run() -> None:
    x = torch.empty(4, 8, device="meta")
    with recording() as launches:
        find("norm").launch(x, None, eps=1e-6)
        find("norm").launch(x[:0], None, eps=1e-6)
    assert [launch.grid for launch in launches] == [(4,)], "an empty grid starts nothing"


def test_configurations_print_short() -> None:
    assert str(config(4, 2, M=64, N=32)) == "M64 N32 w4 s2"


def test_cost_is_the_slower_of_compute_and_memory() -> None:
    cost = Cost(flops=100.0, bytes=10.0)
    assert cost.seconds(50.0, 10.0) == 2.0 and cost.seconds(1000.0, 1.0) == 10.0


SLOW_TARGETS = [pytest.param(t, marks=pytest.mark.slow) for t in ("sm_80", "gfx942")]


@pytest.mark.parametrize("target", ("sm_90", *SLOW_TARGETS))
@pytest.mark.parametrize("name", NAMES)
def test_default_configurations_compile_and_spill_nothing(name: str, target: str) -> None:
    aot = pytest.importorskip("benchmarks.aot")
    rows = list(aot.table([find(name)], [target]))
    assert rows
    assert not [row for row in rows if row.error or row.spills or not row.fits]


EVERY_HEAD = [
    pytest.param(size, dtype, target, marks=pytest.mark.slow)
    for dtype in ("bfloat16", "float32")
    for size in (16, 32, 64, 80, 96, 128, 160, 192, 256)
    for target in ("sm_80", "sm_90", "gfx942")
    if (size, dtype, target) != (128, "float32", "sm_90")
]


@pytest.mark.parametrize(("size", "dtype", "target"), [(128, "float32", "sm_90"), *EVERY_HEAD])
def test_no_head_size_spills(size: int, dtype: str, target: str) -> None:
    aot = pytest.importorskip("benchmarks.aot")
    rows = list(aot.head_sizes([size], [dtype], [target]))
    assert len(rows) == 3, "forward, dQ, dK and dV"
    assert not [row for row in rows if row.error or row.spills or not row.fits]
    text = aot.head_markdown(rows)
    assert f"E {size}" in text and text.count("0 B") == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_compiles(name: str) -> None:
    aot = pytest.importorskip("benchmarks.aot")
    rows = list(aot.table([find(name)], list(aot.TARGETS), all_configs=True))
    assert not [row for row in rows if row.error]


def test_a_spill_would_be_seen() -> None:
    """The limit is not vacuous: a block far too large for its warps spills on every target."""
    aot = pytest.importorskip("benchmarks.aot")
    kernel = find("norm_backward")
    for target in aot.TARGETS:
        (launch, *_) = aot.record(kernel, kernel.samples[1], target, config(1, 1))
        _, spills, _ = aot.compile_launch(launch, target)
        assert spills > 0
