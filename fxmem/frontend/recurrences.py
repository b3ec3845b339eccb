"""Kernels of state spaces and linear attention, through the functions that transformers dispatches
them by.

Its models call a function that stands for a kernel of another package, or for the same in plain
PyTorch where that is not installed. While a model is captured these functions are ops that
hand a state from chunk to chunk. No model is named here: a function is known by the name of its
kernel.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, reduce
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxmem.kernels.carried import causal_convolution
from fxmem.kernels.recurrence import recurrence
from fxmem.kernels.selective_scan import selective_scan
from fxmem.rules.carried import CALLS, Called


@dataclass(frozen=True, slots=True)
class Kernel:
    """A function with a state: axes of its tensors by the names of its parameters.

    ``initial``, ``final``: parameters that take the state, and ask for the one at the end.
    ``pair``: it gives a pair where it is not asked for that one, too. ``single``: its result in
    plain PyTorch is in float32 whatever its operands. ``own``: what runs in place of one that takes
    no state. ``promotes``: tensors whose dtypes its result has; else it has the first one's.
    """

    axes: dict[str, str]
    out: str
    state: str
    initial: str
    final: str
    pair: bool = True
    single: bool = False
    own: Callable[..., Any] | None = None
    promotes: tuple[str, ...] = ()


_DELTA = {"q": "bthk", "k": "bthk", "v": "btgv", "query": "bthk", "key": "bthk", "value": "btgv",
          "beta": "btg"}  # fmt: skip
KERNELS = {
    "chunk_gated_delta_rule": Kernel(
        {**_DELTA, "g": "btg"}, "btgv", "bgkv", "initial_state", "output_final_state"
    ),
    "chunk_kda": Kernel(
        {**_DELTA, "g": "btgk"}, "btgv", "bgkv", "initial_state", "output_final_state"
    ),
    "mamba_chunk_scan_combined": Kernel(
        {"x": "bthp", "hidden_states": "bthp", "dt": "bth", "A": "h", "B": "btgn", "C": "btgn",
         "D": "h", "dt_bias": "h"},
        "bthp", "bhpn", "initial_states", "return_final_states", pair=False, single=True,
    ),
    "selective_scan_fn": Kernel(
        {"u": "bdt", "delta": "bdt", "A": "dn", "B": "bnt", "C": "bnt", "D": "d", "z": "bdt",
         "delta_bias": "d"},
        "bdt", "bdn", "initial_state", "return_last_state", pair=False, own=selective_scan,
        promotes=("u", "D", "z"),
    ),
}  # fmt: skip
"""By the name of the kernel."""


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
) -> Tensor:
    """``x [B, C, T]``, ``weight [C, K]``."""
    out = causal_convolution(x.to(weight.dtype), weight.unsqueeze(1), bias, 1, x.shape[1])
    return (F.silu(out) if activation is not None else out).to(x.dtype)


def fused(*_: Any, **__: Any) -> None:
    """In place of kernels that do a whole block at once: nothing, so that its parts are called."""


@torch.compiler.allow_in_graph
def call_kernel(name: str, key: str, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """One node of the captured graph; ``key``: of the function in :data:`_FUNCTIONS`."""
    kernel, function = KERNELS[name], _FUNCTIONS[key]
    given = dict(inspect.signature(function).bind(*args, **kwargs).arguments)
    given.pop("kwargs", None)
    tensors = {n: v for n, v in given.items() if isinstance(v, Tensor)}
    rest = {n: v for n, v in given.items() if n not in tensors and n != kernel.initial}
    device = next(iter(tensors.values())).device.type
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    types = {n: v.dtype for n, v in tensors.items()}
    whole = f"{key}({types}; {rest}) autocast {cast}"
    if whole not in CALLS:
        CALLS[whole] = _called(kernel, function, types, rest, cast)
    y, last, _ = recurrence(list(tensors.values()), whole)
    return y, last[0]


def _called(
    kernel: Kernel, function: Callable[..., Any], types: dict[str, torch.dtype],
    rest: dict[str, Any], cast: torch.dtype | None,
) -> Called:  # fmt: skip
    names = tuple(types)
    asked = {} if kernel.own is not None else {kernel.final: True}
    promoted = [types[n] for n in kernel.promotes if n in types] or [types[names[0]]]
    single = kernel.single and function.__module__.startswith("transformers.")

    def call(values: Any, state: Any) -> Any:
        given = dict(zip(names, values, strict=True))
        return function(**given, **rest, **asked, **{kernel.initial: state})

    def out_type() -> torch.dtype:
        return torch.float32 if single else reduce(torch.promote_types, promoted)

    return Called(
        tuple(kernel.axes[n] for n in names), kernel.out, kernel.state, call, out_type,
        lambda: torch.float32, cast,
    )  # fmt: skip


_FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""By module and name."""


@lru_cache(maxsize=4096)
def _replacement(function: FunctionType) -> Callable[..., Any] | None:
    """What a model calls in place of a dispatching function while it is captured."""
    known = inspect.getclosurevars(function).nonlocals
    name, implementation = known.get("func_name"), known.get("implementation")
    if name in _COMPOSED:
        return _composed(function, _COMPOSED[name], implementation)
    if name not in KERNELS or implementation is None:
        return None
    kernel = KERNELS[name]
    implementation = kernel.own or implementation
    key = f"{implementation.__module__}.{implementation.__qualname__}"
    _FUNCTIONS[key] = implementation
    parameters = (*inspect.signature(implementation).parameters, kernel.final)

    def fits(name: str, value: Any) -> bool:
        return not isinstance(value, Tensor) or value.dim() == len(kernel.axes.get(name, ""))

    def streamed(*args: Any, **kwargs: Any) -> Any:
        given = {n: v for n, v in kwargs.items() if n in parameters}
        every = (*zip(parameters, args, strict=False), *given.items())
        if not all(fits(n, v) for n, v in every) or _packed(kwargs):
            return function(*args, **kwargs)
        asked = given.pop(kernel.final, False)
        y, last = call_kernel(name, key, *args, **given)
        return (y, last if asked else None) if asked or kernel.pair else y

    return streamed


def _packed(kwargs: Any) -> bool:
    return kwargs.get("cu_seqlens") is not None or kwargs.get("seq_idx") is not None


def _composed(
    function: FunctionType, form: Callable[..., Any], implementation: Callable[..., Any] | None
) -> Callable[..., Any]:
    takes = [] if implementation is None else list(inspect.signature(implementation).parameters)
    others = {n for n in takes if n not in ("x", "weight", "bias", "activation")}

    def streamed(*args: Any, **kwargs: Any) -> Any:
        # a state that it begins with, say; a model may pass on what no kernel takes
        asked = (kwargs.get(n) for n in others)
        asks = len(args) > 3 or any(v is not None and v is not False for v in asked)
        if _packed(kwargs) or (form is convolve and asks):
            return function(*args, **kwargs)
        if kwargs.get("activation") not in (None, "silu", "swish"):
            return function(*args, **kwargs)
        return form(*args, **kwargs)

    return streamed


_COMPOSED: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": convolve,
    "mamba_inner_fn": fused,
    "mamba_split_conv1d_scan_combined": fused,
}


@lru_cache(maxsize=4096)
def _dispatching(module: str) -> tuple[tuple[str, Callable[..., Any]], ...]:
    """Names in a module that stand for kernels, and what replaces them."""
    found = []
    for name, value in vars(sys.modules[module]).items():
        if isinstance(value, FunctionType) and "func_name" in value.__code__.co_freevars:
            new = _replacement(value)
            if new is not None:
                found.append((name, new))
    return tuple(found)


@contextlib.contextmanager
def carried_kernels(model: nn.Module) -> Iterator[None]:
    """Let the kernels that ``model`` calls be ops that stream, inside the context."""
    modules = {c.__module__ for m in model.modules() for c in type(m).__mro__}
    changed = [
        (vars(sys.modules[m]), name, new)
        for m in sorted(modules)
        if m.startswith("transformers.models.") and m in sys.modules
        for name, new in _dispatching(m)
    ]
    before = [(space, name, space[name]) for space, name, _ in changed]
    try:
        for space, name, new in changed:
            space[name] = new
        yield
    finally:
        for space, name, old in before:
            space[name] = old
