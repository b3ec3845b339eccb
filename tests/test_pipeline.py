"""The verifier: each rule has a broken pass that it catches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxmem import _compat
from fxmem.pipeline import copy_graph, run_passes
from fxmem.verify import VerifyError

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
        return _compat.make_fx(lambda x, y: (torch.relu(x @ y) + 1,))(x, y)


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


def test_a_sound_pass_and_its_observers() -> None:
    seen: list[str] = []
    before = graph()
    after = run_passes((Rewrite(tanh),), before, [lambda name, b, a, s: seen.append(name)])
    assert seen == ["rewrite"]
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
    with pytest.raises(VerifyError, match=message):
        run_passes((Rewrite(edit),), graph())


def test_a_pass_that_changes_its_input_is_caught() -> None:
    with pytest.raises(VerifyError, match="changed its input"):
        run_passes((Rewrite(tanh, copies=False),), graph())


def test_dump_by_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FXMEM_DUMP", "1")
    run_passes((Rewrite(tanh),), graph())
    assert "# rewrite" in capsys.readouterr().err
