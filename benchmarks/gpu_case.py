"""What a case of the GPU benchmark is, and how implementations are made.

An implementation is a function without arguments that returns the result tensors (of forward and
backward), so that all of a case can be compared with each other. A library that is not installed
is a reason instead of a function.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxmem.kernels._triton import Config
from fxmem.kernels.kernel import Cost
from fxmem.kernels.registry import find

Result = tuple[Tensor, ...]
Implementation = Callable[[], Result]


@dataclass(frozen=True)
class Case:
    """One operation at one size: implementations (or reasons) by label, and its ideal cost."""

    name: str
    size: str
    implementations: Mapping[str, Implementation | str]
    cost: Cost


@dataclass(frozen=True)
class Setting:
    """Where and how: device, dtype, sizes for a real GPU or tiny ones, all configurations or the
    default one.
    """

    device: torch.device
    dtype: torch.dtype
    small: bool = False
    tune: bool = False

    def rand(self, *shape: int, grad: bool = False) -> Tensor:
        x = torch.randn(*shape, device=self.device, dtype=self.dtype) * 0.5
        return x.requires_grad_(grad)


def imported(module: str, name: str) -> Any:
    """An attribute of an optional library, or the reason why there is none, as text."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as failure:  # a library may fail in many ways where there is no GPU
        return f"{module.split('.')[0]}: {type(failure).__name__}: {str(failure).splitlines()[0]}"


def rival(module: str, name: str, make: Callable[[Any], Implementation]) -> Implementation | str:
    """The implementation that a library's function makes, or the reason why not."""
    found = imported(module, name)
    return found if isinstance(found, str) else make(found)


def ours(
    setting: Setting, name: str, make: Callable[[Mapping[str, Config]], Implementation]
) -> dict[str, Implementation | str]:
    """The kernel with its default configuration, and with each other one where tuning; where it
    cannot run, its reference, labelled so.
    """
    kernel = find(name)
    if not kernel.available(setting.device, setting.dtype):
        return {"fxmem (reference)": make({})}
    found: dict[str, Implementation | str] = {"fxmem": make({})}
    for config in kernel.configs if setting.tune else ():
        found[f"fxmem [{config}]"] = make({"config": config})
    return found


def with_gradients(
    fn: Callable[..., Tensor], inputs: tuple[Tensor, ...], dout: Tensor | None = None
) -> Implementation:
    """Forward and backward by autograd."""

    def run() -> Result:
        out = fn(*inputs)
        grads = torch.autograd.grad(out, inputs, dout)
        return (out.detach(), *grads)

    return run
