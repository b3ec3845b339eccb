"""How a function with a state is called, and the trial of whether its chunks give what it gives."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fxmem.rules.carried import Called

_STATES = ("state", "initial")
"""In the names of parameters that take a state."""
_WIDTH = "\u0100"


@dataclass(frozen=True, slots=True)
class Form:
    """How a function is called.

    Attributes:
        key: of what runs: the function, and what it is bound to.
        types: names of its tensors with dtype, rank, and whether they have one row.
        rest: its other arguments.
        ins, out: letters of their axes; ``b`` and ``t`` are the batch and the sequence.
        sizes: of letters of results alone.
        out_type: dtype of the result.
        parts: shape of each part of the state without its batch, and dtype.
        gives: what stands beside the result: ``None``, one state, or several.
        cast: what autocast lowers to in the call.
    """

    key: str
    function: Callable[..., Any]
    types: tuple[tuple[str, torch.dtype, int, bool], ...]
    rest: tuple[tuple[str, Any], ...]
    ins: tuple[str, ...]
    out: str
    sizes: tuple[tuple[str, int], ...]
    out_type: torch.dtype
    parts: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    gives: type | None
    cast: torch.dtype | None
    states: tuple[str, ...]

    @property
    def name(self) -> str:
        """Equal for forms that run the same on equal tensors."""
        return f"{self.key}({self.types}; {self.rest}) autocast {self.cast}"

    @property
    def state_type(self) -> torch.dtype:
        found = self.parts[0][1]
        for _, dtype in self.parts[1:]:
            found = torch.promote_types(found, dtype)
        return found

    @property
    def width(self) -> int:
        """Numbers in a row of the state."""
        return sum(torch.Size(shape).numel() for shape, _ in self.parts) + 1

    def named(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """By the names of the function's parameters."""
        return dict(zip((n for n, *_ in self.types), tensors, strict=True))

    def given(self, parts: Sequence[Tensor]) -> dict[str, Any]:
        """Arguments that hand the state in."""
        if len(self.states) == len(parts):
            return dict(zip(self.states, parts, strict=True))
        return {self.states[0]: list(parts)}

    def packed(self, parts: Sequence[Tensor]) -> Tensor:
        """The state as rows ``[B, S]``; the last column says that there is one."""
        flat = [p.reshape(p.shape[0], -1).to(self.state_type) for p in parts]
        return torch.cat([*flat, torch.ones_like(flat[0][:, :1])], 1)

    def unpacked(self, state: Tensor) -> list[Tensor]:
        found, at = [], 0
        for shape, dtype in self.parts:
            count = 1
            for size in shape:
                count *= size
            found.append(state[:, at : at + count].reshape(state.shape[0], *shape).to(dtype))
            at += count
        return found

    def fits(self, given: Mapping[str, Any]) -> bool:
        """Whether a call is of this form."""
        count = len(self.types) + len(self.rest)
        there = [n for n, v in given.items() if v is not None]
        if len(there) != count or self.cast != _cast(given):
            return False
        for n, dtype, rank, one in self.types:
            value = given.get(n)
            if not isinstance(value, Tensor) or value.dtype != dtype or value.dim() != rank:
                return False
            if rank and (value.shape[0] != 1 if one else value.shape[0] == 1):
                return False
        return all(given.get(n) == v for n, v in self.rest)

    def result(self, last: Tensor) -> Any:
        """What stands beside the result, of the state at the end."""
        if self.gives is None:
            return None
        parts = self.unpacked(last)
        return parts[0] if self.gives is Tensor else self.gives(parts)

    def run(self, tensors: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        """One chunk; ``state``: zeros for none."""
        there = bool(state[:1, -1:].any())
        handed = self.given(self.unpacked(state)) if there else self.asked()
        y, after = self.function(**self.named(tensors), **{**dict(self.rest), **handed})[:2]
        return y, self.packed(_parts(after))

    def asked(self) -> dict[str, Any]:
        """Its other arguments, no state, and what asks for the one at the end."""
        own = inspect.signature(self.function).parameters
        asked = {n: True for n, p in own.items() if p.default is False and n.startswith("return")}
        return {**dict(self.rest), **dict.fromkeys(self.states), **asked}

    def called(self) -> Called:
        return Called(
            self.ins, self.out, f"b{_WIDTH}", self.run, lambda: self.out_type,
            lambda: self.state_type, self.cast, (*self.sizes, (_WIDTH, self.width)),
        )  # fmt: skip


def _parts(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else list(state)


def _cast(given: Mapping[str, Any]) -> torch.dtype | None:
    device = next(v for v in given.values() if isinstance(v, Tensor)).device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def states_of(function: Callable[..., Any], given: Mapping[str, Any]) -> tuple[str, ...]:
    """Parameters that may take a state, and have got none."""
    return tuple(
        n for n, p in inspect.signature(function).parameters.items()
        if n not in given and p.default in (None, p.empty)
        and any(word in n for word in _STATES) and not n.startswith("return")
    )  # fmt: skip


def form_of(
    function: Callable[..., Any],
    given: Mapping[str, Any],
    result: Any,
    length: int,
    others: Sequence[Form],
) -> Form | None:
    """How the function was called, if its chunks give what the whole gave."""
    given = {n: v for n, v in given.items() if v is not None}
    states = states_of(function, given)
    pair = isinstance(result, (tuple, list)) and len(result) == 2
    if not pair or not isinstance(result[0], Tensor) or not states:
        return None
    tensors = {n: v for n, v in given.items() if isinstance(v, Tensor)}
    rest = {n: v for n, v in given.items() if n not in tensors}
    fixed = all(isinstance(v, (bool, float, str, torch.dtype, int)) for v in rest.values())
    if not fixed or not tensors or length in rest.values() or length < 3:
        return None
    types = tuple((n, t.dtype, t.dim(), t.shape[:1] == (1,)) for n, t in tensors.items())
    gives = None if result[1] is None else type(result[1])
    gives = Tensor if gives is not None and issubclass(gives, Tensor) else gives
    for last in (False, True):
        letters = _Letters(length, result[0].shape[:1], last)
        ins, out = [letters(t) for t in tensors.values()], letters(result[0])
        known = {x for dims in ins for x in dims}
        sizes = tuple((x, n) for x, n in zip(out, result[0].shape, strict=True) if x not in known)
        form = Form(
            "", function, types, tuple(rest.items()), tuple(ins), out, sizes, result[0].dtype, (),
            gives, _cast(given), states,
        )  # fmt: skip
        with contextlib.suppress(Exception), torch.no_grad():
            if out.startswith("b") and (
                tried := _tried(form, [*tensors.values()], result[0], length)
            ):
                return _named(tried, list(tensors.values()), others)
    return None


class _Letters:
    """Axes by their sizes: the batch, or a single row, stands first, beside one of the length, the
    first or the last of such a size. Any other axis has a letter of its own.
    """

    def __init__(self, length: int, batch: Sequence[int], last: bool) -> None:
        self.length, self.batch, self.last, self.count = length, batch, last, ord(_WIDTH)

    def __call__(self, tensor: Tensor) -> str:
        dims = [chr(self.count + 1 + d) for d in range(tensor.dim())]
        self.count += len(dims)
        found = [d for d, size in enumerate(tensor.shape) if d and size == self.length]
        if found and tensor.shape[:1] in (self.batch, (1,)):
            dims[found[-1 if self.last else 0]] = "t"
            dims[0] = "b" if tensor.shape[:1] == self.batch else dims[0]
        return "".join(dims)


def _tried(form: Form, tensors: list[Tensor], whole: Tensor, length: int) -> Form | None:
    """``form`` with its state, or None where chunks give something else."""

    def part(lo: int, hi: int) -> list[Tensor]:
        return [
            t.narrow(dims.index("t"), lo, hi - lo) if "t" in dims else t
            for t, dims in zip(tensors, form.ins, strict=True)
        ]

    def after(hi: int) -> list[Tensor]:
        return _parts(form.function(**form.named(part(0, hi)), **form.asked())[1])

    cuts = [0, 1, length // 2 + 1, length]
    ends = [after(hi) for hi in cuts[1:]]
    if any(p.shape[:1] != whole.shape[:1] for p in ends[-1]):
        return None
    form = replace(form, parts=tuple((tuple(p.shape[1:]), p.dtype) for p in ends[-1]))
    for rows in (slice(None), slice(0, 1)):
        state = whole.new_zeros(whole[rows].shape[0], form.width, dtype=form.state_type)
        found = []
        for lo, hi, end in zip(cuts, cuts[1:], ends, strict=False):
            given = zip(part(lo, hi), form.ins, strict=True)
            y, state = form.run([t[rows] if "b" in dims else t for t, dims in given], state)
            found.append(y)
            if not _near(state, form.packed(end)[rows]):
                return None
        if not _near(torch.cat(found, form.out.index("t")), whole[rows]):
            return None
    return form


def _near(a: Tensor, b: Tensor) -> bool:
    close = torch.finfo(b.dtype).eps ** 0.5
    return (
        a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=close, atol=close)
    )


def _named(form: Form, tensors: list[Tensor], others: Sequence[Form]) -> Form:
    """With the key of another one where that does the same: a method of alike modules."""
    function: Any = getattr(form.function, "func", form.function)
    key = f"{function.__module__}.{function.__qualname__}"
    number = 0
    for other in others:
        if other.key.rpartition("#")[0] != key:
            continue
        number += 1
        same = replace(other, function=form.function) == replace(form, key=other.key)
        if same and (other.function == form.function or _alike(form, other, tensors)):
            return other
    return replace(form, key=f"{key}#{number}")


def _alike(form: Form, other: Form, tensors: list[Tensor]) -> bool:
    given = form.named(tensors) | form.asked()
    return torch.equal(form.function(**given)[0], other.function(**given)[0])


__all__ = ["Form", "form_of", "states_of"]
