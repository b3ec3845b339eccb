"""The plan: what fxmem may do to a model, as plain values.

A plan is immutable, compares and hashes by value and survives a trip through TOML and JSON. All
checks happen when it is built, so nothing is captured or changed for a plan that cannot work.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import tomli_w

from fxmem.checks import (
    byte_size,
    check_names,
    choice,
    mapping,
    option_class,
    tokens,
    without_none,
)
from fxmem.errors import PlanError
from fxmem.plan.blocks import Blocks

if TYPE_CHECKING:
    from fxmem.prune.units.masks import Masks


def _is_masks(value: object) -> bool:
    from fxmem.prune.units.masks import Masks

    return isinstance(value, Masks)


@option_class
@dataclass(frozen=True, slots=True)
class Stream:
    """Stream forward and backward over chunks of the sequence.

    Attributes:
        chunk: tokens per chunk in the body of the model. ``"auto"`` chooses from the memory
            estimate, up to the length beyond which this device is no faster (measured once and
            kept in the cache folder), and leaves short sequences whole. A chunk longer than the
            sequence means one chunk.
        loss_chunk: tokens per chunk in the region that holds the LM head and the loss; ``"auto"``
            as above.
        offload: where the inputs of layers wait for the backward: ``"none"`` leaves them on the
            device, ``"cpu"`` moves them to pinned memory of the host, ``"disk"`` to an unlinked
            file in the temporary directory. With ``memory`` as many as it takes, with ``"least"``
            all. ``"auto"`` is ``"cpu"`` on a GPU and ``"disk"`` on a CPU, where a budget asks for
            it.
        logits: ``"drop"`` does not keep the logits of a captured model that also returns a loss:
            reading them raises DroppedLogitsError. Without a loss they are deferred: what is done
            with them is recorded, and runs chunk by chunk when its result is wanted. ``"keep"``
            keeps them, at sequence length x vocabulary elements.
        hold: ``"auto"`` holds the results of attention from forward to backward, instead of making
            them again, in as many of the last layers as leave the peak of the step where it is:
            their memory is free until the gradients of the earlier layers need it. Only with
            ``memory="least"``. This counts on
            a backward after every forward and on gradients that stay until its end; where hooks
            free them, take ``"none"``, which makes everything again. Not with ``Plan.blocks``; with
            ``lower="inductor"`` only among equal layers, of which one at least then holds in the
            first step and one does not, so that both forms are compiled.
        memory: bytes that a training step may take, with weights, gradients and the states of
            optimizers: an integer, text such as ``"24GB"``, or ``"auto"`` for what is free on the
            device at the call. The fastest step within it is chosen: what the forward made is kept
            for the backward where that saves the most time per byte. ``"least"`` keeps nothing that
            costs memory. A step that cannot fit raises MemoryBudgetError before it begins. Not with
            ``Plan.blocks``.
        sequence: the dimension of a mesh of devices, by its name, whose ranks stream each sequence
            together: ``fxmem.transform(model, plan, mesh=mesh)``. All of them are given the same
            batch and end with the same loss and gradients as one process would have; each
            holds its part of the hidden states. Not with ``memory`` or ``Plan.blocks``.

    Raises:
        PlanError: for an unknown option or an impossible value.
    """

    chunk: int | Literal["auto"] = "auto"
    loss_chunk: int | Literal["auto"] = "auto"
    offload: Literal["none", "cpu", "disk", "auto"] = "none"
    logits: Literal["drop", "keep"] = "drop"
    hold: Literal["auto", "none"] = "auto"
    memory: int | str = "least"
    sequence: str | None = None

    def __post_init__(self) -> None:
        tokens("Stream.chunk", self.chunk)
        tokens("Stream.loss_chunk", self.loss_chunk)
        if self.memory not in ("least", "auto"):
            byte_size("Stream.memory", self.memory)
        choice("Stream.offload", self.offload, ("none", "cpu", "disk", "auto"), ())
        choice("Stream.logits", self.logits, ("drop", "keep"), ())
        choice("Stream.hold", self.hold, ("auto", "none"), ())
        if self.sequence is not None and not (isinstance(self.sequence, str) and self.sequence):
            raise PlanError(
                f"Stream.sequence is {self.sequence!r}",
                advice="allowed values: None or the name of a dimension of the mesh",
            )
        if self.sequence is not None and self.memory != "least":
            raise PlanError(
                f"Stream.memory is {self.memory!r} beside Stream.sequence, whose shares it does "
                "not know",
                advice='take memory="least"; hold="auto" and offload work with a sequence',
            )

    def to_dict(self) -> dict[str, int | str | None]:
        """The fields as a dict of plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Stream:
        """Build from `to_dict`'s result; fields left out take their defaults.

        Raises:
            PlanError: `data` is no mapping, or has an unknown name or an impossible value.
        """
        return cls(**mapping(cls, data))


@option_class
@dataclass(frozen=True, slots=True)
class Plan:
    """What `fxmem.transform` and the ``"fxmem"`` backend do to a model.

    Attributes:
        stream: how to stream over the sequence; None leaves the sequence whole.
        blocks: train one block at a time with `fxmem.BlockAdamW`; None trains as usual.
        prune: masks of a smaller model (:class:`fxmem.Masks`); ``transform`` returns that model.
        lower: how chunk bodies run. ``"eager"`` calls PyTorch's own operators; ``"inductor"``
            compiles each distinct body once, for all lengths, at its first call; ``"triton"`` puts
            fxmem's kernels where one fits and can run on the device, and PyTorch's operators
            elsewhere; ``"auto"`` is ``"triton"`` on a GPU and ``"eager"`` on a CPU.

    Raises:
        PlanError: for an unknown option or an impossible value.
    """

    stream: Stream | None = None
    blocks: Blocks | None = None
    prune: Masks | None = None
    lower: Literal["auto", "eager", "inductor", "triton"] = "auto"

    def __post_init__(self) -> None:
        if self.stream is not None and not isinstance(self.stream, Stream):
            raise PlanError(
                f"Plan.stream is {self.stream!r}",
                advice="allowed values: None or fxmem.Stream(...)",
            )
        if self.prune is not None and not _is_masks(self.prune):
            raise PlanError(
                f"Plan.prune is {self.prune!r}", advice="allowed values: None or fxmem.Masks"
            )
        if self.blocks is not None and not isinstance(self.blocks, Blocks):
            raise PlanError(
                f"Plan.blocks is {self.blocks!r}",
                advice="allowed values: None or fxmem.Blocks(...)",
            )
        if self.blocks is not None and self.stream is not None and self.stream.memory != "least":
            raise PlanError(
                f"Stream.memory is {self.stream.memory!r} beside Plan.blocks, which keep nothing",
                advice='take memory="least"; offload works with blocks',
            )
        if self.blocks is not None and self.stream is not None and self.stream.sequence is not None:
            raise PlanError(
                "Stream.sequence beside Plan.blocks, whose updates happen inside the backward",
                advice="train without Plan.blocks, or leave out Stream.sequence",
            )
        choice("Plan.lower", self.lower, ("auto", "eager", "inductor", "triton"), ())

    def to_dict(self) -> dict[str, Any]:
        """The plan as nested dicts of plain values, every field present."""
        stream = None if self.stream is None else self.stream.to_dict()
        blocks = None if self.blocks is None else self.blocks.to_dict()
        prune = None if self.prune is None else self.prune.to_dict()
        return {"stream": stream, "blocks": blocks, "prune": prune, "lower": self.lower}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Build from `to_dict`'s result; fields left out take their defaults.

        Raises:
            PlanError: `data` is no mapping, or has an unknown name or an impossible value.
        """
        values = mapping(cls, data)
        if values.get("stream") is not None:
            values["stream"] = Stream.from_dict(values["stream"])
        if values.get("blocks") is not None:
            values["blocks"] = Blocks.from_dict(values["blocks"])
        if values.get("prune") is not None:
            from fxmem.prune.units.masks import Masks

            values["prune"] = Masks.from_dict(values["prune"])
        return cls(**values)

    def to_toml(self) -> str:
        """The plan as TOML. TOML has no null, so fields that are None are left out."""
        return tomli_w.dumps(without_none(self.to_dict()))

    @classmethod
    def from_toml(cls, text: str) -> Plan:
        """Read a plan from TOML.

        Raises:
            PlanError: `text` is not TOML, or has an unknown name or an impossible value.
        """
        try:
            data = tomllib.loads(text)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
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
        except (ValueError, TypeError, RecursionError) as error:
            raise PlanError(f"the plan is not valid JSON: {error}") from error
        return cls.from_dict(data)

    def digest(self) -> str:
        """SHA-256 of the canonical JSON, 64 hex digits: the same in every process."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


__all__ = ["Blocks", "Plan", "Stream", "check_names"]
