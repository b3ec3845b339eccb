"""Private names of torch's dispatcher: autograd inside an operator, which runs below it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["recorded"]

_AUTOGRAD = ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor")


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Autograd records what runs inside, wherever that is."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD:
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield
