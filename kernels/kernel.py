"""What a kernel says of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxmem.axes.signature import Dims, Signature
from fxmem.kernels._triton import GPU_TYPES, Config, why_no_triton

HALF = (torch.float16, torch.bfloat16)


FLOATS = (torch.float32, *HALF)


@dataclass(frozen=True, slots=True)
class Cost:
    """Work of one call: floating-point operations, and bytes moved to and from memory if every
    operand is read once and every result written once. ``tensor_cores``: the operations are matrix
    products, not arithmetic element by element.
    """

    flops: float
    bytes: float
    tensor_cores: bool = True

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Time by the roofline model (Williams et al., 2009): the slower of the two."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether a kernel can run; ``reason`` says why not, and is empty where it can."""

    reason: str = ""

    def __bool__(self) -> bool:
        return not self.reason


@dataclass(frozen=True, slots=True)
class Sample:
    """A call at realistic size for the ahead-of-time compiler and the roofline table.

    ``arguments()`` makes the arguments on the meta device; ``cost`` is that of the call.
    """

    label: str
    arguments: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    cost: Cost
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Kernel:
    """One kernel.

    Args:
        name: unique name, the switch by which lowering turns it on or off.
        ops: operators (``"aten.mm.default"``) whose node can be the root of a match. Composite
            kernels, whose subgraph has several nodes, list the node that makes the result.
        signature: axis letters of tensor operands and results, in the order of ``reference``.
        reference: the same in plain PyTorch.
        launch: the Triton launcher; takes a further keyword ``config``.
        configs: tuning configurations; the first of a sample's own is what ``launch`` takes.
        dtypes: dtypes of the main operands.
        devices: device types it was written for.
        samples: calls for ahead-of-time compilation and cost tables.
        limits: further conditions in words, for ``explain``.
        accumulators: operands that the kernel only adds into; in the signature they are results.
    """

    name: str
    ops: tuple[str, ...]
    signature: Signature
    reference: Callable[..., Any]
    launch: Callable[..., Any]
    configs: tuple[Config, ...] = ()
    dtypes: tuple[torch.dtype, ...] = FLOATS
    devices: tuple[str, ...] = GPU_TYPES
    samples: tuple[Sample, ...] = ()
    limits: str = ""
    accumulators: tuple[str, ...] = ()

    def available(self, device: torch.device | str, dtype: torch.dtype) -> Availability:
        """Whether the Triton kernel can run for main operands of ``dtype`` on ``device``."""
        device = torch.device(device)
        if dtype not in self.dtypes:
            names = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            return Availability(f"dtype {str(dtype).removeprefix('torch.')} is not one of {names}")
        reason = why_no_triton(device)
        return Availability(reason)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The Triton kernel where it is available for the first tensor, else the reference."""
        first = next(x for x in args if isinstance(x, Tensor))
        run = self.launch if self.available(first.device, first.dtype) else self.reference
        return run(*args, **kwargs)


def unify(pattern: Signature, target: Signature) -> dict[str, str] | None:
    """The renaming of ``pattern``'s letters that makes it ``target``, or None.

    Dims must match one to one and letters injectively. A letter that ``target`` needs whole must be
    whole in the pattern, since the kernel is then given all of it, and its sums must be sums there.
    """
    if len(pattern.ins) != len(target.ins) or len(pattern.outs) != len(target.outs):
        return None
    table: dict[str, str] = {}
    pairs = zip((*pattern.ins, *pattern.outs), (*target.ins, *target.outs), strict=True)
    if not all(_match(a, b, table) for a, b in pairs):
        return None
    if len(set(table.values())) != len(table) or pattern.sums != target.sums:
        return None
    whole = {table[letter] for letter in pattern.whole if letter in table}
    return table if target.whole & set(table.values()) <= whole else None


def _match(a: Dims | None, b: Dims | None, table: dict[str, str]) -> bool:
    if a is None or b is None:
        return a is b
    if [len(d) for d in a] != [len(d) for d in b]:
        return False
    letters = zip((x for d in a for x in d), (y for d in b for y in d), strict=True)
    return all(table.setdefault(x, y) == y for x, y in letters)


def dims(text: str) -> Dims:
    """``"b h q e"`` -> one letter per dimension; ``1`` is a dimension of size one."""
    return tuple(() if letter == "1" else (letter,) for letter in text.split())


def signature(spec: str, whole: str = "", prefix: tuple[int, ...] = (), **rest: Any) -> Signature:
    """A signature from text such as ``"m k, k n -> m n"``."""
    left, right = spec.split("->")
    ins, outs = (tuple(dims(part) for part in side.split(",")) for side in (left, right))
    return Signature(ins, outs, frozenset(whole.split()), frozenset(prefix), **rest)
