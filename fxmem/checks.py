"""Checks that the parts of a plan share."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from typing import Any, TypeVar

from fxmem.errors import PlanError

_T = TypeVar("_T")


def check_names(owner: str, given: Collection[object], known: Collection[str]) -> None:
    """Refuse option names that `owner` does not have.

    Raises:
        PlanError: for the first unknown name, with the nearest known one where there is one.
    """
    for name in given:
        if name in known:
            continue
        near = get_close_matches(str(name), known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise PlanError(
            f"{owner} has no option {name!r}", advice=f"{hint}known options: {', '.join(known)}"
        )


def option_class(cls: type[_T]) -> type[_T]:
    """A frozen dataclass of options: PlanError for an unknown keyword, pickles that outlive fields.

    A pickle holds values by name; one of version 0.1.0 holds them in order. What it lacks takes its
    default, so a new field goes last. `_upgrade`, if there is one, sees the older form first.
    """
    init = cls.__init__
    known = cls.__match_args__  # type: ignore[attr-defined]

    @functools.wraps(init)
    def checked(self: _T, *args: Any, **kwargs: Any) -> None:
        check_names(cls.__name__, kwargs, known)
        init(self, *args, **kwargs)

    def state(self: _T) -> dict[str, Any]:
        return {name: getattr(self, name) for name in known}

    def restore(self: _T, state: Mapping[str, Any] | Sequence[Any]) -> None:
        if not isinstance(state, Mapping):
            upgrade = getattr(cls, "_upgrade", lambda values: dict(zip(known, values)))  # noqa: B905
            state = upgrade(state)
        for field in fields(cls):  # type: ignore[arg-type]
            value = state.get(field.name, field.default)
            object.__setattr__(self, field.name, value)

    cls.__init__ = checked  # type: ignore[assignment]
    cls.__getstate__ = state  # type: ignore[assignment]
    cls.__setstate__ = restore  # type: ignore[attr-defined]
    return cls


def mapping(cls: type[Any], data: object) -> dict[str, Any]:
    """A fresh dict of options for the dataclass `cls`, names checked."""
    if not isinstance(data, Mapping):
        raise PlanError(f"{cls.__name__} is {data!r}", advice="give a table of named options")
    check_names(cls.__name__, data, cls.__match_args__)
    for field in fields(cls):
        if field.default is MISSING and field.default_factory is MISSING and field.name not in data:
            raise PlanError(f"{cls.__name__} has no {field.name}", advice="give it a value")
    return dict(data)


def choice(field: str, value: object, available: tuple[str, ...], later: tuple[str, ...]) -> None:
    """Check a field that takes one of a few words; `later` are known but not available yet."""
    allowed = " or ".join(f'"{word}"' for word in available)
    if isinstance(value, str) and value in available:
        return
    if isinstance(value, str) and value in later:
        raise PlanError(
            f"{field} = {value!r} is not available in this version", advice=f"use {allowed}"
        )
    raise PlanError(f"{field} is {value!r}", advice=f"allowed values: {allowed}")


def tokens(field: str, value: object) -> None:
    """Check a field that is a number of tokens or "auto"."""
    if isinstance(value, str) and value == "auto":
        return
    # True would pass as a chunk of one token.
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return
    raise PlanError(
        f"{field} is {value!r}",
        advice='allowed values: "auto" or an integer of at least 1 (tokens)',
    )


_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


def byte_size(name: str, value: object) -> int:
    """Bytes of an integer, or of text such as ``"24GB"`` (10**9 bytes) or ``"1.5 GiB"`` (2**30).

    Raises:
        PlanError: it is neither, has an unknown unit, or is less than one byte; says ``name``.
    """
    size = 0
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value, re.ASCII | re.IGNORECASE)
        size = int(float(found[1]) * _UNITS.get(found[2].lower(), 0)) if found else 0
    if size < 1:
        raise PlanError(
            f"{name} is {value!r}",
            advice="give bytes as an integer, or text such as '24GB' (10**9) or '24GiB' (2**30)",
        )
    return size


def without_none(data: Mapping[str, Any]) -> dict[str, Any]:
    """A nested dict without the fields that are None."""
    return {
        k: without_none(v) if isinstance(v, Mapping) else v
        for k, v in data.items()
        if v is not None
    }


__all__ = [
    "byte_size",
    "check_names",
    "choice",
    "mapping",
    "option_class",
    "tokens",
    "without_none",
]
