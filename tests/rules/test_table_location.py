"""Oracle 2: labels against real runs at two lengths.

Every joint graph is run with 23 and with 29 tokens. A dimension whose size differs is a sequence
dimension; the symbolic shapes must say the same, and the label of every streamed value must cut
such a dimension, by as many rows as it really has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from traced import MODELS, region_codes

from fxmem.axes.sizes import evaluate, evaluate_shape, has_axis
from fxmem.frontend.capture import canonical, is_wide
from fxmem.frontend.joint import Joint
from fxmem.runtime.region_code import RegionCode
from fxmem.streaming.labels import Kind, Label, Labels, analyse

LENGTHS = (23, 29)
BATCH = 2
Shape = tuple[int, ...]


class Shapes(fx.Interpreter):
    """Runs a graph and keeps the shape of every tensor."""

    def __init__(self, joint: Joint) -> None:
        super().__init__(joint.module)
        self.seen: dict[str, Shape] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.seen[n.name] = tuple(value.shape)
        return value


def environment(joint: Joint, length: int) -> dict[str, int]:
    return {**{str(s): BATCH for s in joint.symbols.values()}, "T": length}


def example(node: fx.Node, joint: Joint, env: Mapping[str, int]) -> Any:
    info = joint.info[node]
    if info is None:
        return evaluate(canonical(node.meta["val"], joint.symbols), env)
    shape = evaluate_shape(info.shape, env)
    if info.dtype.is_floating_point:
        return torch.rand(shape, dtype=info.dtype)
    return torch.zeros(shape, dtype=info.dtype)


def real_shapes(joint: Joint, length: int) -> dict[str, Shape]:
    env = environment(joint, length)
    runner = Shapes(joint)
    runner.run(*(example(n, joint, env) for n in joint.graph.find_nodes(op="placeholder")))
    return runner.seen


def codes(model: str) -> list[RegionCode]:
    return [c for c in region_codes(model) if c.learns]


def flat_label(labels: Labels, node: fx.Node) -> Label | None:
    label = labels.label.get(node)
    return label if isinstance(label, Label) else None


@pytest.mark.parametrize("model", MODELS)
def test_cuts_lie_on_sequence_dimensions(model: str) -> None:
    cuts = 0
    for code in codes(model):
        joint = code.joint
        short, long = (real_shapes(joint, n) for n in LENGTHS)
        labels = analyse(joint, causal=True)
        for node in joint.graph.nodes:
            info = joint.info.get(node)
            if node.name not in short or info is None:
                continue
            for shapes, n in zip((short, long), LENGTHS, strict=True):
                assert evaluate_shape(info.shape, environment(joint, n)) == shapes[node.name]
            pairs = list(zip(short[node.name], long[node.name], strict=True))
            assert [a != b for a, b in pairs] == [has_axis(d) for d in info.shape], node
            label = flat_label(labels, node)
            if label is None or label.kind is not Kind.CUT:
                continue
            assert label.cut is not None
            cut, cuts = label.cut, cuts + 1
            assert pairs[cut.dim][0] != pairs[cut.dim][1], f"{node} is cut along a constant"
            for size, n in zip(pairs[cut.dim], LENGTHS, strict=True):
                env = environment(joint, n)
                outer, rows, inner = (evaluate(x, env) for x in (cut.outer, cut.length, cut.inner))
                assert size == outer * rows * inner, node
                assert 0 <= evaluate(cut.offset, env) <= n - rows
    assert cuts > 20


@pytest.mark.parametrize("model", MODELS)
def test_no_wide_value_stands_whole_by_an_ops_fault(model: str) -> None:
    for code in codes(model):
        labels = analyse(code.joint, causal=True)
        assert [b for b in labels.barriers if is_wide(b.shape)] == []
