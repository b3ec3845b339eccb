"""The collector of garbage rests while a model is captured, and only then."""

from __future__ import annotations

import gc

import pytest
import tiny
import torch

import fxmem
from fxmem.compiler import compile as compiler


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_it_is_as_before_after_every_call(
    before: bool, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def split(*_: object, **__: object) -> object:
        seen.append(gc.isenabled())
        if fails:
            raise fxmem.CaptureError("as if it could not be cut")
        return plain(*_, **__)  # type: ignore[arg-type]

    plain = compiler.regions.split
    monkeypatch.setattr(compiler.regions, "split", split)
    torch._dynamo.reset()
    model = fxmem.transform(tiny.model())
    was = gc.isenabled()
    (gc.enable if before else gc.disable)()
    try:
        for _ in range(2):
            if fails:
                with pytest.raises(fxmem.CaptureError):
                    model(**tiny.batch(1, 9))
            else:
                model(**tiny.batch(1, 9))
            assert gc.isenabled() == before
    finally:
        (gc.enable if was else gc.disable)()
    assert seen and not any(seen)
