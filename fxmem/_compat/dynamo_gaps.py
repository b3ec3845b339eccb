"""What Dynamo refuses to trace and has a plain answer, given while fxmem captures.

- ``x.requires_grad_()`` on an intermediate value: transformers does it to the embeddings of a
  frozen table (``enable_input_require_grads``, on by default with adapters and checkpointing), so
  that a checkpoint has something to differentiate. No parameter's gradient depends on it.
- ``x.requires_grad = False`` where that is so already.
- ``x.uniform_(low, high)`` with bounds that are tensors (NEFTune), as numbers in [0, 1) scaled.
- Names of torch's classes: ``type(weight).__module__.startswith("torchao.")``.
- ``torch.utils.checkpoint.checkpoint``: the call itself, without a checkpoint. Regions make again
  what they need, and a graph within the graph may not record hidden states by hooks.
- What ``torch.compile(module)`` made: the module inside, with the hooks of the outer one, which
  Dynamo leaves out. Where ``fully_shard`` gave it another class Dynamo has no answer at all.
- In which function of its file a line stands, for a log that nobody reads: Dynamo takes every file
  that it traces to pieces for it.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import threading
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch._dynamo import eval_frame, symbolic_convert
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.variables import (
    BuiltinVariable,
    ConstantVariable,
    TensorVariable,
    builder,
    builtin,
    higher_order_ops,
)
from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable
from torch._dynamo.variables.torch import TorchInGraphFunctionVariable
from torch._higher_order_ops.wrap import TagActivationCheckpoint

_LOCAL = threading.local()
_NAMES = ("__module__", "__name__", "__qualname__")


def capturing() -> bool:
    """A capture of fxmem's own is under way in this thread."""
    return getattr(_LOCAL, "capturing", False)


def _requires_grad(self: Any, tx: Any, requires_grad: Any = True) -> Any:
    wanted = requires_grad is True or requires_grad.as_python_constant() is True
    if capturing() and wanted and self.source is None:
        return self
    return _PLAIN_REQUIRES_GRAD(self, tx, requires_grad)


def _setattr(self: Any, tx: Any, obj: Any, name_var: Any, val: Any) -> Any:
    if (
        capturing() and obj.is_tensor() and name_var.is_python_constant()
        and name_var.as_python_constant() == "requires_grad"
    ):  # fmt: skip
        now = obj.as_proxy().node.meta["example_value"].requires_grad
        if val.is_python_constant() and val.as_python_constant() is now:
            return ConstantVariable.create(None)
    return _PLAIN_SETATTR(self, tx, obj, name_var, val)


def _uniform(self: Any, tx: Any, *bounds: Any, **options: Any) -> Any:
    tensors = [b for b in bounds if b.is_tensor()]
    if not capturing() or len(bounds) != 2 or options or not tensors:
        return None  # Dynamo's own answer
    low, high = bounds
    width = BuiltinVariable(operator.sub).call_function(tx, [high, low], {})
    for name, given in (("uniform_", []), ("mul_", [width]), ("add_", [low])):
        self.call_method(tx, name, given, {})
    return self


def _named(owner: Any, name: str) -> Any:
    """The name of a class of torch's as a constant; None for anything else."""
    known = isinstance(owner, TorchInGraphFunctionVariable) and isinstance(owner.value, type)
    if capturing() and known and name in _NAMES:
        return ConstantVariable.create(getattr(owner.value, name))
    return None


def _getattr(self: Any, tx: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    name = args[1].as_python_constant() if args[1].is_python_constant() else ""
    return _named(args[0], name) or _PLAIN_GETATTR(self, tx, args, kwargs)


def _getattro(self: Any, tx: Any, name: str) -> Any:
    return _named(self, name) or _PLAIN_GETATTR(self, tx, name)


def _checkpoint(self: Any, tx: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if not capturing():
        return _PLAIN_CHECKPOINT(self, tx, args, kwargs)
    _, given = TagActivationCheckpoint.divide_kwargs(kwargs)
    return args[0].call_function(tx, list(args[1:]), given)


def _as_a_module(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return nn.Module.__call__(self, *args, **kwargs)


def _wrap_module(self: Any, value: nn.Module) -> Any:
    if not capturing() or type(value) is not OptimizedModule:
        return _PLAIN_WRAP_MODULE(self, value)
    vars(eval_frame)["OptimizedModule"] = None  # so that it is a module like others
    try:
        return _PLAIN_WRAP_MODULE(self, value)
    finally:
        vars(eval_frame)["OptimizedModule"] = OptimizedModule


def _call_module(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    if not capturing() or not isinstance(self.value, OptimizedModule):
        return _PLAIN_CALL_MODULE(self, tx, args, kwargs)
    instead = vars(OptimizedModule.__call__)  # one capture at a time runs in a process
    instead["_torchdynamo_inline"] = _as_a_module
    try:
        return _PLAIN_CALL_MODULE(self, tx, args, kwargs)
    finally:
        instead.pop("_torchdynamo_inline", None)


def _function_name(filename: str, lineno: int) -> str | None:
    logs = (symbolic_convert.trace_source_log, symbolic_convert.trace_call_log)
    if capturing() and not any(log.isEnabledFor(logging.DEBUG) for log in logs):
        return None
    return _PLAIN_FUNCTION_NAME(filename, lineno)


# PyTorch 2.14 looks methods up in tables and asks the owner for its attributes.
_PLAIN_REQUIRES_GRAD: Any = TensorVariable.method_requires_grad_
if "requires_grad_" in (methods := getattr(TensorVariable, "tp_methods", {})):
    methods["requires_grad_"] = type(methods["requires_grad_"])(_requires_grad)
    methods["uniform_"] = type(methods["requires_grad_"])(_uniform)
else:
    TensorVariable.method_requires_grad_ = _requires_grad  # type: ignore[method-assign]
    TensorVariable.method_uniform_ = _uniform  # type: ignore[attr-defined]

# PyTorch before 2.13 has one class for all builtin functions: there Dynamo's own refusals stay.
_PLAIN_SETATTR: Any = None
if (setter := getattr(builtin, "SetAttrBuiltinVariable", None)) is not None:
    _PLAIN_SETATTR, setter._call_setattr = setter._call_setattr, _setattr

_PLAIN_GETATTR: Any = None
owners: Any = TorchInGraphFunctionVariable
getter: Any = getattr(builtin, "GetAttrBuiltinVariable", None)
if "tp_getattro_impl" in vars(owners):
    _PLAIN_GETATTR, owners.tp_getattro_impl = owners.tp_getattro_impl, _getattro
elif getter is not None:
    _PLAIN_GETATTR, getter._call_getattr = getter._call_getattr, _getattr

_PLAIN_CHECKPOINT: Any = None
if (owner := getattr(higher_order_ops, "CheckpointHigherOrderVariable", None)) is not None:
    _PLAIN_CHECKPOINT, owner._call_function = owner._call_function, _checkpoint

_PLAIN_WRAP_MODULE: Any = builder.VariableBuilder.wrap_module
builder.VariableBuilder.wrap_module = _wrap_module  # type: ignore[method-assign]

_PLAIN_CALL_MODULE: Any = UnspecializedNNModuleVariable.call_function
UnspecializedNNModuleVariable.call_function = _call_module  # type: ignore[method-assign]

_PLAIN_FUNCTION_NAME: Any = getattr(symbolic_convert, "get_funcname", None)
if _PLAIN_FUNCTION_NAME is not None:
    vars(symbolic_convert)["get_funcname"] = _function_name


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """Captures of this thread get these answers."""
    before = capturing()
    _LOCAL.capturing = True
    try:
        yield
    finally:
        _LOCAL.capturing = before


__all__ = ["answered", "capturing"]
