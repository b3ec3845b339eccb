"""Oracle 1: signatures fit the op schemas, and every op of traced models has a row."""

from __future__ import annotations

import operator

import pytest
import torch
from table_samples import IDS, SAMPLES, Sample
from traced import MODELS, region_codes

from fxmem.rules import TABLE, lookup


def schema_tensors(sample: Sample) -> int:
    """Tensor operands of the call by the op's schema: one per Tensor argument that is given."""
    count = 0
    for argument, value in zip(sample.target._schema.arguments, sample.args, strict=False):
        kind = str(argument.type)
        if "Tensor" in kind and value is not None:
            values = value if "List" in kind else [value]
            count += sum(v is not None for v in values)
    return count


@pytest.mark.parametrize("op", sorted(TABLE))
def test_op_exists(op: str) -> None:
    namespace, name, overload = op.split(".")
    packet = getattr(getattr(torch.ops, namespace), name)
    assert overload in packet.overloads(), op


@pytest.mark.parametrize("sample", SAMPLES, ids=IDS)
def test_signature_fits_the_call(sample: Sample) -> None:
    call, sig = sample.call, sample.signature
    assert len(sig.ins) == len(call.tensors) == schema_tensors(sample)
    returns = sample.target._schema.returns
    assert len(sig.outs) == len(call.outs)
    assert "List" in str(returns[0].type) or len(returns) == len(call.outs)
    for dims, t in zip(sig.ins, call.tensors, strict=True):
        assert len(dims) == t.rank
    for out, made in zip(sig.outs, call.outs, strict=True):
        assert (out is None) == (made is None)
        assert out is None or made is None or len(out) == made.rank
    if sample.row.linear is not None:
        assert sample.row.linear < len(call.tensors)


@pytest.mark.parametrize("sample", SAMPLES, ids=IDS)
def test_letters_agree_in_size(sample: Sample) -> None:
    """A letter that may be cut has one size everywhere; a dim is the product of its letters."""
    call, sig = sample.call, sample.signature
    found = dict(sig.extent)
    tensors = [*zip(sig.ins, call.tensors, strict=True)]
    tensors += [(d, o) for d, o in zip(sig.outs, call.outs, strict=True) if d is not None and o]
    for dims, t in tensors:
        for dim, size in zip(dims, t.shape, strict=True):
            if len(dim) == 0:
                # A factory looks at no element of its operand.
                assert size == 1 or sample.op.startswith("aten.new_")
            elif len(dim) == 1 and dim[0] not in {*sig.whole, *sig.shift}:
                assert found.setdefault(dim[0], size) == size
            elif len(dim) > 1:
                product = 1
                for letter in dim:
                    product *= int(sig.extent[letter])
                assert product == size


def test_sizes_argument_holds_the_output_shape() -> None:
    for sample in SAMPLES:
        at = sample.row.sizes
        if at is not None and not sample.op.startswith("aten.squeeze."):
            given = list(sample.args[at])
            out = sample.call.out.shape
            assert len(given) == len(out)
            assert all(g in (-1, o) for g, o in zip(given, out, strict=True)), sample.op


@pytest.mark.parametrize("model", MODELS)
def test_every_traced_op_has_a_row(model: str) -> None:
    missing = set()
    for code in region_codes(model):
        for node in code.joint.graph.nodes:
            if node.op != "call_function" or code.joint.info[node] is None:
                continue
            if node.target is not operator.getitem and lookup(node.target) is None:
                missing.add(str(node.target))
    assert missing == set()
