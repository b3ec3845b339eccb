"""What leaves the library when something fails: an error with a name, and a model as it was.

Faults are planted in every stage of the compiler, with exceptions of every sort.
"""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmem
import fxmem.kernels.attention
import fxmem.passes.in_place
import fxmem.program.body_ops
from fxmem import CaptureError, FxmemWarning, InternalError, Plan, Stream, api, dynamo_backend
from fxmem.compiler import compile as compiled
from fxmem.compiler import region_codes, step
from fxmem.frontend import faults
from fxmem.frontend.origin import Line, is_own, path_of, place
from fxmem.runtime import loops, region_code
from fxmem.runtime.code_library import CodeLibrary
from fxmem.streaming import token_mixing

PLAN = Plan(stream=Stream(chunk=4, loss_chunk=4))
WHOLE = Plan(stream=Stream(memory="1GB"))
"""A budget holds for one graph only, so a model is not captured in parts."""
D = 8


class Block(nn.Module):
    def __init__(self, fn: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.mix, self.fn = nn.Linear(D, D), fn

    def forward(self, x: Tensor) -> Tensor:
        q = self.mix(x).unsqueeze(1)
        x = x + F.scaled_dot_product_attention(q, q, q, is_causal=True).squeeze(1)
        return self.fn(self, x)


class Net(nn.Module):
    scale = 1

    def __init__(self, fn: Callable[[Any, Tensor], Tensor] = lambda block, x: x) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(11, D), nn.ModuleList([Block(fn), Block(fn)])
        self.head = nn.Linear(D, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) * self.scale
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


class Flat(Net):
    """Calls ``fn`` itself: there is no part around it that could run as it is."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block.fn(block, x + block.mix(x))
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def pair(
    *args: Any, kind: type[Net] = Net, plan: Plan = PLAN
) -> tuple[nn.Module, nn.Module, Tensor]:
    net = kind(*args).double()
    return fxmem.transform(copy.deepcopy(net), plan), net, torch.randint(11, (2, 13))


def agree(streamed: nn.Module, plain: nn.Module, ids: Tensor) -> None:
    """One step of both gives the same loss and gradients."""
    for net in (streamed, plain):
        net.zero_grad()
    a, b = streamed(ids), plain(ids)
    a.backward()
    b.backward()
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for p, q in zip(streamed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


STAGES: dict[str, tuple[Any, str]] = {
    "copy": (compiled, "copy_graph"), "sizes": (compiled._compat, "unify_sizes"),
    "numbers": (compiled, "fix_numbers"), "passes": (compiled, "run_passes"),
    "capture": (compiled.cap, "analyse"), "preamble": (compiled.pre_, "lower"),
    "regions": (compiled.regions, "split"), "mixes": (token_mixing, "trace"),
    "joint": (region_code.joint_trace, "trace"), "labels": (token_mixing, "analyse"),
    "footprint": (region_code, "footprint"), "chunker": (compiled.Chunker, "of"),
    "length": (dynamo_backend, "has_varying_size"),
    # at the first forward or backward
    "sizes of a call": (step, "bind_sizes"), "prepare": (compiled.pre_, "execute"),
    "schedule": (region_code, "schedule"), "emit": (region_code.Emitter, "run"),
    "loop": (loops, "_run_loop"),
}  # fmt: skip
EXCEPTIONS: list[type[Exception]] = [
    KeyError, AssertionError, sympy.PolynomialError, RuntimeError, TypeError, IndexError,
    ZeroDivisionError, AttributeError, NotImplementedError, StopIteration, RecursionError,
    ValueError, NameError, torch._dynamo.exc.InternalTorchDynamoError,
]  # fmt: skip


def planted(fault: BaseException) -> Callable[..., Any]:
    """A function that raises, whose file is not one of the user's."""
    space: dict[str, Any] = {"fault": fault}
    exec(compile("def fails(*_, **__):\n    raise fault", "<planted>", "exec"), space)
    return space["fails"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("stage", STAGES)
def test_a_fault_in_any_stage_is_named_and_the_next_step_is_right(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed, plain, ids = pair()
    owner, name = STAGES[stage]
    fault = EXCEPTIONS[list(STAGES).index(stage) % len(EXCEPTIONS)]("planted")
    state = {k: v.clone() for k, v in streamed.state_dict().items()}

    with monkeypatch.context() as patch:
        patch.setattr(region_codes, "_CODES", CodeLibrary())
        patch.setattr(token_mixing, "_MIXING", {})
        patch.setattr(owner, name, planted(fault))
        with pytest.raises(InternalError, match=type(fault).__name__) as caught:
            streamed(ids).backward()
    assert caught.value.__cause__ is fault
    assert "report" in str(caught.value)
    assert all(torch.equal(v, state[k]) for k, v in streamed.state_dict().items())
    assert all(p.grad is None for p in streamed.parameters())
    agree(streamed, plain, ids)


@pytest.mark.parametrize("stage", ["passes", "joint"])
def test_faults_leave_by_name_through_torch_compile(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name = STAGES[stage]
    monkeypatch.setattr(region_codes, "_CODES", CodeLibrary())
    monkeypatch.setattr(owner, name, planted(KeyError("T")))
    call = torch.compile(Net(), backend=fxmem.backend(PLAN), fullgraph=True)
    with pytest.raises(InternalError, match="KeyError: 'T'"):
        call(torch.randint(11, (2, 13)))


def test_an_interrupt_and_exhausted_memory_leave_as_themselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for fault in (KeyboardInterrupt(), MemoryError()):
        streamed, plain, ids = pair()
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "run_passes", planted(fault))
            with pytest.raises(type(fault)):
                streamed(ids)
        agree(streamed, plain, ids)


def raises_an_error(block: Any, x: Tensor) -> Tensor:
    raise LookupError("of the model itself")


def mismatches(block: Any, x: Tensor) -> Tensor:
    return x + torch.ones(3, 77)


def of_a_list(block: Any, x: Tensor) -> Tensor:
    return block.mix([x])  # type: ignore[no-any-return]


@pytest.mark.parametrize("fn", [raises_an_error, mismatches, of_a_list])
def test_what_the_model_raises_leaves_as_in_plain_pytorch(fn: Callable[..., Tensor]) -> None:
    streamed, plain, ids = pair(fn)
    with pytest.raises(Exception) as want:  # noqa: PT011  # whatever plain PyTorch raises
        plain(ids)
    with pytest.raises(type(want.value)) as got:
        streamed(ids)
    assert type(got.value) is type(want.value)
    assert str(got.value) == str(want.value)


def test_a_hook_of_the_user_raises_as_itself() -> None:
    streamed, plain, ids = pair()

    def refuse(*_: Any) -> None:
        raise LookupError("of a hook")

    handle = streamed.get_submodule("blocks.1").register_forward_hook(refuse)
    with pytest.raises(LookupError, match="of a hook"):
        streamed(ids)
    handle.remove()
    torch._dynamo.reset()
    bias = streamed.get_parameter("head.bias")
    handle = bias.register_hook(refuse)
    with pytest.raises(LookupError, match="of a hook"):
        streamed(ids).backward()
    handle.remove()
    agree(streamed, plain, ids)


def test_an_id_beyond_the_vocabulary_is_the_error_of_plain_pytorch() -> None:
    streamed, plain, ids = pair()
    agree(streamed, plain, ids)
    wrong = ids.clone()
    wrong[0, 3] = 11
    with pytest.raises(IndexError) as want:
        plain(wrong)
    with pytest.raises(IndexError) as got:
        streamed(wrong)
    assert str(got.value) == str(want.value)
    agree(streamed, plain, ids)


def branches(block: Any, x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def test_the_first_words_say_what_and_where_and_dynamos_come_last() -> None:
    streamed, _, ids = pair(branches, kind=Flat, plan=WHOLE)
    with pytest.raises(CaptureError) as caught:
        streamed(ids)
    error, text = caught.value, str(caught.value)
    assert text.startswith("Flat cannot be captured: Data-dependent branching | at ")
    assert "in branches  return x if x.sum() > 0 else -x" in (error.source or "")
    assert "rewrite the named line" in (error.advice or "")
    assert error.reason is not None
    assert text.endswith(error.reason)
    assert len(error.reason) <= 200
    assert "TORCHDYNAMO" not in text
    assert "\n" not in text
    shown = "".join(traceback.format_exception(error))
    assert shown.count("\n") < 30 and "Hint" not in shown
    assert "Hint" in str(error.original)


def splits(block: Any, x: Tensor) -> Tensor:
    high = (x.detach()[..., 0] > 0).sum()
    counts = torch.stack([high, x[..., 0].numel() - high]).tolist()
    return torch.cat([block.mix(p) for p in x.flatten(0, 1).split(counts)]).view_as(x)


def mean_of_some_rows(block: Any, x: Tensor) -> Tensor:
    return x + block.mix(x)[x.detach()[..., 0] > 0].mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize("fn", [splits, mean_of_some_rows])
def test_a_size_that_is_the_value_of_a_tensor(fn: Callable[..., Tensor]) -> None:
    streamed, _, ids = pair(fn, kind=Flat, plan=WHOLE)
    with pytest.raises(CaptureError, match="depends on the values of a tensor") as caught:
        streamed(ids)
    assert f"in {fn.__name__}" in (caught.value.source or "")


class Vision(nn.Module):
    """A large model that streams behind a small part that cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.eyes, self.language = Block(branches), Net()

    def forward(self, ids: Tensor) -> Tensor:
        seen = branches(None, self.eyes.mix(torch.ones(1, 3, D))).sum()
        return self.language(ids) + seen  # type: ignore[no-any-return]


def test_advice_names_a_way_out_that_the_user_can_take() -> None:
    net = fxmem.transform(Vision(), WHOLE)
    with pytest.raises(CaptureError, match="rewrite the named line"):
        net(torch.randint(11, (2, 13)))


class Cleans(nn.Module):
    def __init__(self, fn: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.inside = Block(fn)

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.inside(x)
        finally:
            self.inside.train()


def none_if_compiled(block: Any, x: Tensor) -> Tensor:
    rows: Any = None if torch.compiler.is_compiling() else [x]
    return rows[0]


def test_what_raises_inside_a_finally_is_the_part_that_runs_as_it_is() -> None:
    torch.manual_seed(0)
    plain = Net().double()
    plain.blocks[1] = Cleans(none_if_compiled).double()
    streamed = copy.deepcopy(plain)
    fxmem.transform(streamed, PLAN)
    agree(streamed, plain, torch.randint(11, (2, 9)))
    pieces = fxmem.explain(streamed).pieces
    assert {p.name for p in pieces} == {"blocks.0", "blocks.1.inside"}  # both are of one class
    assert all("rows[0]" in p.reason for p in pieces)


def test_too_many_captures_say_what_varies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "RECAPTURES", 2)
    streamed, plain, ids = pair()
    for scale in (1.5, 2.5):
        streamed.scale = plain.scale = scale
        agree(streamed, plain, ids)
    streamed.scale = 3.5
    with pytest.raises(CaptureError, match="captured too often.*scale"):
        streamed(ids)
    streamed.scale = 2.5
    agree(streamed, plain, ids)


def test_one_warning_per_operator() -> None:
    streamed, plain, ids = pair(lambda block, x: x + x.sort(1).values + x.cumsum(1).tanh())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        agree(streamed, plain, ids)
    texts = [str(w.message) for w in caught if issubclass(w.category, FxmemWarning)]
    ops = [text.split(" ")[0] for text in texts]
    assert any("aten.sort" in op for op in ops)
    assert len(ops) == len(set(ops)), texts


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self'].model.layers[3].mlp", "model.layers.3.mlp"),
        ("L['args'][0].model._modules['layers']._modules['3']", "model.layers.3"),
        ("L['fn'].__self__.head", "head"),
        ("L['model'].layers[0]", "model.layers.0"),
        ("L['self']", None),
    ],
)
def test_modules_are_called_what_the_user_calls_them(source: str, path: str | None) -> None:
    assert path_of(source) == path


def test_the_users_line_is_preferred_to_a_librarys() -> None:
    own = Line("train.py", 3, "loss", "net(x)")
    library = Line("/v/lib/site-packages/transformers/models/a.py", 7, "forward", "x[i]")
    torchs = Line("/v/lib/site-packages/torch/nn/functional.py", 9, "linear", "op(x)")
    assert place([own, library, torchs]) is own
    assert place([library, torchs]) is library
    assert place([torchs]) is torchs
    assert place([]) is None
    assert str(library).startswith('File "transformers/models/a.py", line 7')


def test_advice_about_a_librarys_line_can_be_followed() -> None:
    line = 'File "somewhere/models/a.py", line 7, in forward  x.exponential_()'
    error = fxmem.MutationError("written in place", module="eyes.mix", source=line)
    named = faults._with_way_out(error, Vision())
    assert str(named).endswith("where somewhere cannot be changed: fxmem.transform(model.language)")
    own = fxmem.MutationError("written", module="eyes", source='File "/me/a.py", line 7, in f')
    assert "cannot be changed" not in str(faults._with_way_out(own, Vision()))


def test_every_file_of_the_package_is_its_own() -> None:
    for module in (fxmem, fxmem.program.body_ops, fxmem.passes.in_place, fxmem.kernels.attention):
        assert is_own(str(module.__file__)), module.__name__
    assert not is_own(__file__)
