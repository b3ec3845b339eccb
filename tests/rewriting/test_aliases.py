"""Who shares memory: what the operators of the table do is what the compiler believes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from table_samples import IDS, SAMPLES, Sample
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxmem._compat import graph as _compat


def _tensors(values: object) -> Iterator[Tensor]:
    return (v for v in pytree.tree_leaves(values) if isinstance(v, Tensor))


@pytest.mark.parametrize("sample", SAMPLES, ids=IDS)
def test_a_result_in_an_operands_memory_is_known_to_be_a_view(sample: Sample) -> None:
    node = fx.Graph().call_function(sample.target)
    operands = {t.untyped_storage().data_ptr() for t in _tensors(sample.args) if t.numel()}
    shared = any(t.untyped_storage().data_ptr() in operands for t in _tensors(sample.run()))
    assert (
        _compat.may_alias(node) or not shared or not isinstance(node.target, torch._ops.OpOverload)
    )
