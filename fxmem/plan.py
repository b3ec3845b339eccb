"""The plan: what fxmem may do to a model, as plain values.

A plan is immutable, compares and hashes by value and survives a trip through TOML and JSON. All
checks happen when it is built, so nothing is captured or changed for a plan that cannot work.
"""

from __future__ import annotations

import functools
import hashlib
import json
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any, Literal, TypeVar

import tomli_w

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


def _refuse_unknown(cls: type[_T]) -> type[_T]:
    """Make the constructor answer an unknown keyword with a PlanError, not a bare TypeError."""
    init = cls.__init__
    known = cls.__match_args__  # type: ignore[attr-defined]

    @functools.wraps(init)
    def checked(self: _T, *args: Any, **kwargs: Any) -> None:
        check_names(cls.__name__, kwargs, known)
        init(self, *args, **kwargs)

    cls.__init__ = checked  # type: ignore[assignment]
    return cls


def _mapping(cls: type, data: object) -> dict[str, Any]:
    """A fresh dict of options for `cls`, names checked."""
    if not isinstance(data, Mapping):
        raise PlanError(f"{cls.__name__} is {data!r}", advice="give a table of named options")
    check_names(cls.__name__, data, cls.__match_args__)  # type: ignore[attr-defined]
    return dict(data)


def _choice(field: str, value: object, available: tuple[str, ...], later: tuple[str, ...]) -> None:
    """Check a field that takes one of a few words; `later` are known but not available yet."""
    allowed = " or ".join(f'"{word}"' for word in available)
    if isinstance(value, str) and value in available:
        return
    if isinstance(value, str) and value in later:
        raise PlanError(
            f"{field} = {value!r} is not available in this version", advice=f"use {allowed}"
        )
    raise PlanError(f"{field} is {value!r}", advice=f"allowed values: {allowed}")


def _tokens(field: str, value: object) -> None:
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


@_refuse_unknown
@dataclass(frozen=True, slots=True)
class Stream:
    """Stream forward and backward over chunks of the sequence.

    Attributes:
        chunk: tokens per chunk in the body of the model. ``"auto"`` chooses from the memory
            estimate and never makes a short sequence slower than not streaming it. A chunk longer
            than the sequence means one chunk.
        loss_chunk: tokens per chunk in the region that holds the LM head and the loss; ``"auto"``
            as above.
        offload: where values kept from the forward wait for the backward; ``"none"`` leaves them
            on the device.
        logits: ``"drop"`` does not keep the logits of a captured model that also returns a loss:
            reading them raises DroppedLogitsError. ``"keep"`` keeps them, at sequence length x
            vocabulary elements.

    Raises:
        PlanError: for an unknown option or an impossible value.
    """

    chunk: int | Literal["auto"] = "auto"
    loss_chunk: int | Literal["auto"] = "auto"
    offload: Literal["none"] = "none"
    logits: Literal["drop", "keep"] = "drop"

    def __post_init__(self) -> None:
        _tokens("Stream.chunk", self.chunk)
        _tokens("Stream.loss_chunk", self.loss_chunk)
        _choice("Stream.offload", self.offload, ("none",), ("cpu",))
        _choice("Stream.logits", self.logits, ("drop", "keep"), ())

    def to_dict(self) -> dict[str, int | str]:
        """The fields as a dict of plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Stream:
        """Build from `to_dict`'s result; fields left out take their defaults.

        Raises:
            PlanError: `data` is no mapping, or has an unknown name or an impossible value.
        """
        return cls(**_mapping(cls, data))


@_refuse_unknown
@dataclass(frozen=True, slots=True)
class Plan:
    """What `fxmem.transform` and the ``"fxmem"`` backend do to a model.

    Attributes:
        stream: how to stream over the sequence; None leaves the sequence whole.
        blocks: block coordinate descent; not available in this version, must be None.
        prune: structured pruning; not available in this version, must be None.
        lower: how chunk bodies run. ``"eager"`` calls PyTorch's own operators; ``"inductor"``
            compiles each distinct body once, for all lengths, at its first call; ``"triton"`` puts
            fxmem's kernels where one fits and can run on the device, and PyTorch's operators
            elsewhere; ``"auto"`` is ``"triton"`` on a GPU and ``"eager"`` on a CPU.

    Raises:
        PlanError: for an unknown option or an impossible value.
    """

    stream: Stream | None = None
    blocks: None = None
    prune: None = None
    lower: Literal["auto", "eager", "inductor", "triton"] = "auto"

    def __post_init__(self) -> None:
        if self.stream is not None and not isinstance(self.stream, Stream):
            raise PlanError(
                f"Plan.stream is {self.stream!r}",
                advice="allowed values: None or fxmem.Stream(...)",
            )
        for name in ("blocks", "prune"):
            if (value := getattr(self, name)) is not None:
                raise PlanError(
                    f"Plan.{name} is {value!r}, but {name} is not available in this version",
                    advice="leave it None",
                )
        _choice("Plan.lower", self.lower, ("auto", "eager", "inductor", "triton"), ())

    def to_dict(self) -> dict[str, Any]:
        """The plan as nested dicts of plain values, every field present."""
        stream = None if self.stream is None else self.stream.to_dict()
        return {"stream": stream, "blocks": self.blocks, "prune": self.prune, "lower": self.lower}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Build from `to_dict`'s result; fields left out take their defaults.

        Raises:
            PlanError: `data` is no mapping, or has an unknown name or an impossible value.
        """
        values = _mapping(cls, data)
        if values.get("stream") is not None:
            values["stream"] = Stream.from_dict(values["stream"])
        return cls(**values)

    def to_toml(self) -> str:
        """The plan as TOML. TOML has no null, so fields that are None are left out."""
        return tomli_w.dumps({k: v for k, v in self.to_dict().items() if v is not None})

    @classmethod
    def from_toml(cls, text: str) -> Plan:
        """Read a plan from TOML.

        Raises:
            PlanError: `text` is not TOML, or has an unknown name or an impossible value.
        """
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise PlanError(f"the plan is not valid TOML: {error}") from error
        return cls.from_dict(data)

    def to_json(self) -> str:
        """The plan as one line of JSON with sorted keys; equal plans give equal text."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan from JSON.

        Raises:
            PlanError: `text` is not JSON, or has an unknown name or an impossible value.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise PlanError(f"the plan is not valid JSON: {error}") from error
        return cls.from_dict(data)

    def digest(self) -> str:
        """SHA-256 of the canonical JSON, 64 hex digits: the same in every process."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()
