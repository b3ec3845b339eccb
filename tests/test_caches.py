"""Process-wide tables: named, bounded, emptied; a model that runs is not hurt."""

from __future__ import annotations

import gc
import weakref

import tiny
import torch

import fxmem
from fxmem import Plan, Stream, caches
from fxmem.compiler.region_codes import _CODES


def test_a_table_has_a_name_and_a_limit() -> None:
    table: caches.Cache[str, int] = caches.Cache("of this test", 2)
    for i, key in enumerate("abc"):
        table[key] = i
    assert dict(table) == {"b": 1, "c": 2}
    assert caches.sizes()["of this test"] == 2


def test_tables_may_share_a_name() -> None:
    """The second hides nothing of the first, and leaves nothing behind."""
    first: caches.Cache[int, int] = caches.Cache("of two", 2)
    second: caches.Cache[int, int] = caches.Cache("of two", 2)
    first[0] = second[1] = 2
    assert caches.sizes()["of two"] == 2
    del second
    assert caches.sizes()["of two"] == 1
    caches.clear()
    assert not first


def test_emptied_under_a_running_model() -> None:
    caches.clear()
    net, inputs = tiny.model(), tiny.batch(1, 20)
    fxmem.transform(net, Plan(stream=Stream(chunk=8)))
    loss, grads = tiny.step(net, inputs)
    codes = [weakref.ref(code) for code in _CODES]
    assert codes and caches.sizes()["region code"] == len(codes)
    caches.clear()
    assert not list(_CODES) and not any(caches.sizes().values())
    again, others = tiny.step(net, inputs)
    assert again == loss
    assert all(torch.equal(grads[n], others[n]) for n in grads)
    del net
    torch._dynamo.reset()
    gc.collect()
    assert not any(code() is not None for code in codes), "code of a dead model is alive"
