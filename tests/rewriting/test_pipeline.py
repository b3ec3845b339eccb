"""The verifier: each rule has a broken pass that it catches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import traced
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxmem._compat import graph as _compat
from fxmem._compat import tracing
from fxmem.axes.signature import TensorInfo
from fxmem.axes.sizes import T
from fxmem.compiler import region_codes
from fxmem.errors import VerificationError
from fxmem.frontend.joint import Joint
from fxmem.rewriting import pipeline
from fxmem.rewriting.pipeline import Applied, copy_graph, run_passes
from fxmem.rewriting.verify import _agree
from fxmem.runtime.code_library import CodeLibrary

Edit = Callable[[fx.GraphModule], None]


@dataclass(frozen=True)
class Rewrite:
    edit: Edit
    name: str = "rewrite"
    copies: bool = True

    def run(self, gm: fx.GraphModule, /) -> fx.GraphModule:
        gm = copy_graph(gm) if self.copies else gm
        self.edit(gm)
        return gm


def graph() -> fx.GraphModule:
    with _compat.FakeTensorMode(shape_env=ShapeEnv()) as mode:
        x, y = (mode.from_tensor(torch.ones(s)) for s in ((3, 4), (4, 3)))
        return tracing.make_fx(lambda x, y: (torch.relu(x @ y) + 1,))(x, y)


def node(gm: fx.GraphModule, part: str) -> fx.Node:
    return next(n for n in gm.graph.nodes if part in str(n.target))


def tanh(gm: fx.GraphModule) -> None:
    node(gm, "relu").target = torch.ops.aten.tanh.default


def wrong_shape(gm: fx.GraphModule) -> None:
    node(gm, "relu").target = torch.ops.aten.sum.default


def wrong_dtype(gm: fx.GraphModule) -> None:
    node(gm, "relu").target = torch.ops.aten.isnan.default


def no_value(gm: fx.GraphModule) -> None:
    relu = node(gm, "relu")
    with gm.graph.inserting_after(relu):
        new = gm.graph.call_function(torch.ops.aten.tanh.default, (relu,))
    node(gm, "add").args = (new, 1)


def extra_output(gm: fx.GraphModule) -> None:
    (out,) = gm.graph.find_nodes(op="output")
    out.args = ((*out.args[0], node(gm, "relu")),)


def use_before_definition(gm: fx.GraphModule) -> None:
    node(gm, "add").append(node(gm, "relu"))


def test_a_sound_pass_and_its_observers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Applied[Any]] = []
    monkeypatch.setattr(pipeline, "OBSERVERS", [seen.append])
    before = graph()
    after = run_passes((Rewrite(tanh),), before, "here")
    (applied,) = seen
    assert (applied.name, applied.where, applied.edits) == ("rewrite", "here", 1)
    assert "-relu" in applied.diff() and "tanh" in applied.diff()
    assert "tanh" in str(after.graph)
    assert "tanh" not in str(before.graph)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (wrong_shape, "the op gives"),
        (wrong_dtype, "the op gives"),
        (no_value, "is missing"),
        (extra_output, "changed the signature"),
        (use_before_definition, "malformed graph"),
    ],
)
def test_broken_passes_are_caught(edit: Edit, message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        run_passes((Rewrite(edit),), graph())


def test_a_pass_that_changes_its_input_is_caught() -> None:
    with pytest.raises(VerificationError, match="changed its input"):
        run_passes((Rewrite(tanh, copies=False),), graph())


@pytest.mark.parametrize(("switch", "shown"), [("FXMEM_DUMP", "mm"), ("FXMEM_DIFF", "+relu")])
def test_dump_and_diff_by_environment(
    switch: str, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(switch, "1")
    run_passes((Rewrite(tanh),), graph())
    said = capsys.readouterr().err
    assert "# rewrite: 1 nodes changed" in said and f"\n{shown} = " in said


@dataclass(frozen=True)
class RewriteJoint:
    edit: Callable[[Joint], None]
    name: str = "rewrite"

    def run(self, joint: Joint, /) -> Joint:
        joint = joint.copy()
        self.edit(joint)
        return joint


def swapped_gradients(joint: Joint) -> None:
    at = [i for i, g in enumerate(joint.grads) if g is not None]
    a, b = at[:2]
    joint.grads[a], joint.grads[b] = joint.grads[b], joint.grads[a]


def other_output(joint: Joint) -> None:
    joint.outputs[0] = joint.inputs[0]


def lost_input(joint: Joint) -> None:
    joint.inputs.pop()


def missing_info(joint: Joint) -> None:
    del joint.info[next(n for n in joint.graph.nodes if n.op == "call_function" and joint.info[n])]


def untrue_info(joint: Joint) -> None:
    node = joint.inputs[0]
    joint.info[node] = TensorInfo((*joint.info[node].shape, T), joint.info[node].dtype)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (swapped_gradients, "the gradients"),
        (other_output, "the outputs"),
        (lost_input, "the inputs"),
        (missing_info, "is noted as None"),
        (untrue_info, "is noted as"),
    ],
)
def test_broken_passes_over_joint_graphs_are_caught(
    edit: Callable[[Joint], None], message: str
) -> None:
    joint = traced.region_codes("small")[-1].joint
    run_passes((RewriteJoint(lambda joint: None),), joint)
    with pytest.raises(VerificationError, match=message):
        run_passes((RewriteJoint(edit),), joint)


def test_sizes_are_compared_as_expressions() -> None:
    gm = tracing.make_fx(lambda x: x * 2, tracing_mode="symbolic")(torch.ones(5, 3))
    (x,) = (n.meta["val"] for n in gm.graph.find_nodes(op="placeholder"))
    n = x.shape[0]
    assert isinstance(n, torch.SymInt)
    assert _agree(x.new_empty(2 * n + 2, 3), x.new_empty((n + 1) * 2, 3))
    assert not _agree(x.new_empty(2 * n + 2, 3), x.new_empty(2 * n + 3, 3))


@pytest.mark.parametrize("name", traced.MODELS)
def test_every_node_of_every_pass_is_true(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes as the compiler runs them, each result evaluated from its inputs on."""
    monkeypatch.setenv("FXMEM_VERIFY", "full")
    monkeypatch.setattr(region_codes, "_CODES", CodeLibrary())
    traced.region_codes.__wrapped__(name)


def test_full_verification_sees_what_was_wrong_before(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = graph()
    node(gm, "relu").meta["val"] = node(gm, "mm").meta["val"].to(torch.float64)
    run_passes((Rewrite(lambda gm: None),), gm)
    monkeypatch.setenv("FXMEM_VERIFY", "full")
    with pytest.raises(VerificationError, match="the op gives"):
        run_passes((Rewrite(lambda gm: None),), gm)
