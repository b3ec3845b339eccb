"""accelerate takes ``"fxmem"`` for a backend, whichever of the two is imported first."""

from __future__ import annotations

import enum
import subprocess
import sys

import pytest
from accelerate.utils import DynamoBackend, TorchDynamoPlugin

from fxmem._compat import accelerate as _compat


def test_the_enum_is_as_it_is_known() -> None:
    assert _compat.known(DynamoBackend)
    assert not _compat.known(enum.Enum("Other", "INDUCTOR"))


def test_the_backend_is_a_member() -> None:
    plugin = TorchDynamoPlugin(backend="fxmem", mode="max-autotune")
    assert plugin.to_kwargs() == {"backend": "fxmem", "mode": "max-autotune"}
    assert "fxmem" not in DynamoBackend.list() and "FXMEM" in DynamoBackend.list()
    assert DynamoBackend("FXMEM") in DynamoBackend
    with pytest.raises(ValueError, match="FXMEN"):
        TorchDynamoPlugin(backend="fxmen")


@pytest.mark.parametrize("order", ["import fxmem, accelerate", "import accelerate, fxmem"])
def test_in_either_order(order: str) -> None:
    check = "accelerate.utils.TorchDynamoPlugin(backend='fxmem')"
    subprocess.run([sys.executable, "-c", f"{order}; {check}"], check=True)
