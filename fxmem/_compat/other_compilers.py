"""A model that streams by itself, where another compiler captures what calls it.

Dynamo looks into the forward of a module whatever its call is replaced by, so a ``torch.compile``
around a transformed model would run it as plain PyTorch, without a word. Such a capture ends before
the call and goes on behind it. Where fxmem is the compiler the model is captured with the rest.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import unimplemented
from torch._dynamo.variables import nn_module

from fxmem._compat.dynamo_gaps import capturing
from fxmem.errors import FxmemWarning

__all__ = ["by_itself"]

_STREAMS = "_fxmem_streams"
"""An attribute of calls that stream."""
_WHY = "fxmem streams this model by itself"


def by_itself(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call``, into which no other compiler looks."""
    made: Callable[..., Any] = torch.compiler.disable(call, reason=_WHY)
    setattr(made, _STREAMS, True)
    return made


def _ours(tx: Any) -> bool:
    """The capture under way is fxmem's, or for a backend of fxmem's."""
    backend: Any = getattr(tx.output, "compiler_fn", None)
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    own = getattr(backend, "compiler_fn", backend)
    return capturing() or str(getattr(own, "__module__", "")).startswith("fxmem.")


def _call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    call = vars(self.value).get("_compiled_call_impl")
    if getattr(call, _STREAMS, False) and not _ours(tx):
        unimplemented(
            gb_type="a transformed model", context=type(self.value).__name__, explanation=_WHY,
            hints=["Compile what is around the model, without fullgraph=True."],
        )  # fmt: skip
    return _PLAIN_CALL(self, tx, args, kwargs)


@functools.wraps(nn.Module.compile)
def _compile(self: nn.Module, *args: Any, **kwargs: Any) -> None:
    if getattr(self._compiled_call_impl, _STREAMS, False):
        warnings.warn(
            f"{type(self).__name__}.compile() changes nothing: the model is transformed, and stays "
            "so", FxmemWarning, stacklevel=2,
        )  # fmt: skip
        return
    _PLAIN_COMPILE(self, *args, **kwargs)


_PLAIN_CALL: Any = nn_module.UnspecializedNNModuleVariable.call_function
nn_module.UnspecializedNNModuleVariable.call_function = _call_function  # type: ignore[method-assign]
_PLAIN_COMPILE: Any = nn.Module.compile
nn.Module.compile = _compile  # type: ignore[method-assign]
