"""Every exception and warning that fxmem raises, one class per failure.

All share one message template, ``what was found | where | what to do``. The parts stay readable as
attributes, so a caller can act on them without parsing text. A part that is not known is left out
of the message, never guessed.
"""

from __future__ import annotations

from typing import ClassVar


class FxmemError(Exception):
    """Base of every error of fxmem.

    Args:
        what: what was found, one sentence, with the values at fault.
        op: the operator at fault, such as ``"aten.sort.default"``.
        module: dotted path of the module that calls it, such as ``"model.layers.3.mlp"``.
        source: file and line of the user's code, such as ``"modeling_llama.py:312"``.
        advice: what to do; the class's own ``default_advice`` where none is given.
    """

    default_advice: ClassVar[str | None] = None
    by_plan: ClassVar[bool] = False
    """The plan or the step is at fault, not the model: it need not be captured in another way."""
    original: BaseException | None = None
    """What another library raised, where the message says all that a user needs of it."""

    def __init__(
        self,
        what: str,
        *,
        op: str | None = None,
        module: str | None = None,
        source: str | None = None,
        advice: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.op = op
        self.module = module
        self.source = source
        self.advice = self.default_advice if advice is None else advice

    @property
    def where(self) -> str:
        """Op, module path and source line, those that are known; an empty string where none is."""
        named = (("op", self.op), ("module", self.module), ("at", self.source))
        return ", ".join(f"{name} {value}" for name, value in named if value)

    def __str__(self) -> str:
        return " | ".join(part for part in (self.what, self.where, self.advice) if part)

    def __reduce__(self) -> tuple[object, ...]:
        # The default form would call the class with `what` alone and is lost on keyword-only
        # arguments; errors cross process borders in the benchmarks and in data-parallel training.
        return (type(self), (self.what,), {**self.__dict__, "original": None})


class CaptureError(FxmemError):
    """The model cannot be captured as a graph.

    Args:
        what: what was being captured, and what stands in the way.
        reason: Dynamo's own words for why it stopped; the last part of the message.
    """

    default_advice = (
        "rewrite the named line so that torch.compile(fullgraph=True) accepts it, "
        "or do not transform this model"
    )

    def __init__(
        self,
        what: str,
        *,
        reason: str | None = None,
        op: str | None = None,
        module: str | None = None,
        source: str | None = None,
        advice: str | None = None,
    ) -> None:
        super().__init__(what, op=op, module=module, source=source, advice=advice)
        self.reason = reason

    def __str__(self) -> str:
        return " | ".join(filter(None, (super().__str__(), self.reason)))


class UnsupportedOpError(FxmemError):
    """A construct inside a streamed region has no exact fallback."""

    default_advice = "move it out of the streamed part of the model, or train without Stream"


class MutationError(FxmemError):
    """The captured graph writes in place on one of its inputs."""

    default_advice = "write the result to a new tensor and return it, instead of changing the input"


class HookError(FxmemError):
    """A hook watches a gradient that a streamed step never has as a whole."""

    default_advice = (
        "put the hook on a module that returns hidden states, such as the layer around it, "
        "or undo with fxmem.restore(model) while the hook is there"
    )


class DoubleBackwardError(FxmemError):
    """A gradient of a gradient, or one in forward mode, was asked of a streamed region."""

    default_advice = (
        "call backward without create_graph=True; "
        "for second derivatives undo with fxmem.restore(model) first"
    )


class BackwardTwiceError(FxmemError):
    """Backward ran a second time through a region whose saved tensors are freed."""

    default_advice = "pass retain_graph=True to the first backward, or run the forward again"


class ModifiedParameterError(FxmemError):
    """A parameter or input was changed in place between forward and backward."""

    by_plan = True
    default_advice = (
        "call optimizer.step() and other in-place changes after backward, or run the forward again"
    )


class DroppedLogitsError(FxmemError):
    """The program reads logits that the plan allows fxmem not to keep."""

    default_advice = 'ask for them with Stream(logits="keep"), or read them under torch.no_grad()'


class PlanError(FxmemError, ValueError):
    """A plan or an option has an unknown name or an impossible value."""

    by_plan = True


class BudgetError(FxmemError, ValueError):
    """A pruning budget cannot be met, or a search has nothing to measure it by."""

    default_advice = "choose another keep rate, or give batches with labels"


class MemoryBudgetError(FxmemError, ValueError):
    """A step does not fit into ``Stream(memory=...)``."""

    by_plan = True
    default_advice = (
        'give more memory, a shorter sequence or a smaller batch, Stream(offload="disk"), or '
        "train fewer parameters at a time with Plan(blocks=...)"
    )


class OffloadError(FxmemError, OSError):
    """Saved tensors cannot be moved off the device, or do not come back."""

    by_plan = True
    default_advice = (
        "free space in the temporary directory or name another one in the environment variable "
        'TMPDIR, or train with Stream(offload="none"); parameters and gradients are as before'
    )


class DivergedError(FxmemError):
    """Ranks that must hold equal values do not."""

    default_advice = "give every rank the same model, batches and options, in the same order"


class LostRankError(FxmemError):
    """Another process that trains the same model does not answer."""

    by_plan = True
    default_advice = (
        "see what ended or stopped the other process, then start all of them again, from a "
        "checkpoint; all of them must call forward and backward alike"
    )


class RoleError(FxmemError):
    """A parameter has a role that the compiled step cannot honour."""

    by_plan = True
    default_advice = "give the parameter another role, or leave it out of the blocks"


class BlockStateError(FxmemError):
    """Block training was asked for something its state does not allow."""

    by_plan = True
    default_advice = "go on with the options and the partition that the state was made with"


class NotTransformedError(FxmemError):
    """A model that fxmem.transform has not seen was given where a transformed one is needed."""

    default_advice = "call fxmem.transform(model, plan) first"


class VerificationError(FxmemError):
    """A check between two compiler passes failed: a fault in fxmem, found before anything ran."""

    default_advice = (
        "this is a bug in fxmem; please report it with this message and the model's configuration"
    )


class InternalError(VerificationError):
    """The compiler failed, or what it made failed when it ran: a fault in fxmem."""

    default_advice = (
        "this is a bug in fxmem; please report it with this message and the model's configuration, "
        "and train this model without fxmem.transform until then"
    )


class FetchError(FxmemError):
    """The demo's model could not be fetched, or what came is not what was expected."""

    default_advice = "check the network and try again, or name a local model folder with --model"


class FxmemWarning(UserWarning):
    """Something is exact but not as lean as asked for, such as an op that runs whole."""


class MaskError(FxmemError, ValueError):
    """Masks do not fit the model, or a smaller model would not equal the masked one."""

    default_advice = "make masks for this model with fxmem.coupling(model)"


class FileError(FxmemError):
    """A file cannot be read or written, or is not what it should be."""

    default_advice = "check the path, its permissions and the free space of the disk"


class PruningFileError(FileError, ValueError):
    """The files of a saved smaller model are missing, damaged or do not fit together."""

    default_advice = "save the model again with fxmem.save_pretrained"
