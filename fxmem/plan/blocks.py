"""Options of block training, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fxmem.checks import choice, mapping, option_class
from fxmem.errors import PlanError

ORDERS = ("random", "sampled", "ascending", "descending", "fixed")


def _number(field: str, value: object, low: float, *, whole: bool = False) -> None:
    kinds = (int,) if whole else (int, float)
    # nan compares false, so it is refused too
    if isinstance(value, kinds) and not isinstance(value, bool) and low <= value < float("inf"):
        return
    kind = "an integer" if whole else "a finite number"
    raise PlanError(f"{field} is {value!r}", advice=f"give {kind} of at least {low:g}")


@option_class
@dataclass(frozen=True, slots=True)
class SGD:
    """Inactive weights move by ``-lr * gradient`` inside the backward (BREAD-SGD).

    ``lr`` is the step size at the optimizer's first learning rate and follows its schedule.
    """

    lr: float

    def __post_init__(self) -> None:
        _number("SGD.lr", self.lr, 0)


@option_class
@dataclass(frozen=True, slots=True)
class SignSGD:
    """Inactive weights move by ``-lr * sign(gradient)`` inside the backward."""

    lr: float

    def __post_init__(self) -> None:
        _number("SignSGD.lr", self.lr, 0)


@option_class
@dataclass(frozen=True, slots=True)
class LowRank:
    """Inactive matrices learn a term ``alpha / rank * up @ down`` by Adam (BREAD-LoRA).

    Attributes:
        lr: learning rate of ``down`` at the optimizer's first learning rate; None takes that one.
        rank: columns of ``up``.
        alpha: scale times rank (Hu et al. 2021).
        ratio: learning rate of ``up`` over that of ``down`` (LoRA+, arXiv 2402.12354).
        exclude: parameters or modules without a term, by name.
    """

    rank: int = 8
    alpha: float = 32.0
    lr: float | None = None
    ratio: float = 1.0
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _number("LowRank.rank", self.rank, 1, whole=True)
        _number("LowRank.alpha", self.alpha, 0)
        _number("LowRank.ratio", self.ratio, 0)
        if self.lr is not None:
            _number("LowRank.lr", self.lr, 0)
        object.__setattr__(self, "exclude", _names("LowRank.exclude", self.exclude))


KINDS: dict[str, type[SGD | SignSGD | LowRank]] = {
    "sgd": SGD, "sign": SignSGD, "low_rank": LowRank
}  # fmt: skip


def _names(field: str, value: object) -> tuple[str, ...]:
    if isinstance(value, (tuple, list)) and all(isinstance(v, str) for v in value):
        return tuple(value)
    raise PlanError(f"{field} is {value!r}", advice="give a tuple of names")


@option_class
@dataclass(frozen=True, slots=True)
class Blocks:
    """Block coordinate descent (BAdam, arXiv 2404.02827), with the landscape of the active block
    expanded by cheap updates of the inactive ones (BREAD, NeurIPS 2025).

    Attributes:
        partition: ``"layer"``, or blocks as tuples of names of parameters or modules.
        layers_per_block: successive layers in one block of ``"layer"``.
        outer: parameters outside the layers of ``"layer"`` (embedding, final norm, head):
            ``"inactive"`` are never active but updated as inactive ones (as both papers do: only
            decoder layers are blocks), ``"blocks"`` are blocks ``embed`` and ``head``,
            ``"attach"`` belong to the first and last block, ``"frozen"``.
        order: ``"random"`` (new permutation per block-epoch), ``"sampled"`` (any block at every
            visit, as LISA does, arXiv 2403.17919), ``"ascending"`` from the input,
            ``"descending"``, ``"fixed"`` on block ``start``.
        steps: optimizer steps per visit.
        inactive: update of inactive blocks; None leaves them as they are.
        reach: ``"deeper"`` updates only what is used after the active block's first use.
        update_head: False leaves the parameters after the layers out of the inactive updates.
        seed: of permutations, stochastic rounding and low-rank terms.
        frozen: names of parameters or modules that never learn.
        always_active: names that AdamW trains in every visit.
        accumulation: of SGD and sign updates over several backwards per step: ``"micro"`` applies
            each at once (a sign by 1 / ``micro_batches``), ``"last"`` takes the last one times
            their number, ``"accumulate"`` keeps sums, in float32 at least. None refuses a second
            backward. Accelerate and the Trainer say which backward is the last one; in a loop of
            your own set ``is_last_micro_batch``.
        micro_batches: backwards per optimizer step, which `SignSGD` with ``"micro"`` must know.
        clip: of SGD and sign updates: ``"value"`` per entry, ``"per_tensor"`` by the norm
            ``clip_norm / sqrt(tensors)``, ``"delayed"`` by the global norm of the step before.
        guard: no update from a gradient that is not finite, nor after one in the same step; the
            active block then stays as well. Updates made before it in that backward remain. Where
            products go straight into a weight, factors are checked instead of their product.
        warmup_after_switch: steps of linear warmup of the active block in each visit.
        average: average gradients over the processes of the default group before every update;
            inside DistributedDataParallel they are averaged over its own, whatever this says.
        compat: ``"blockoptimizers"`` follows microsoft/BlockOptimizers: the first visit is a step
            short and norms decay.

    Raises:
        PlanError: for an unknown option or an impossible value.
    """

    partition: Literal["layer"] | tuple[tuple[str, ...], ...] = "layer"
    order: str = "random"
    steps: int = 100
    inactive: SGD | SignSGD | LowRank | None = None
    reach: Literal["deeper", "all"] = "deeper"
    seed: int = 0
    start: int = 0
    layers_per_block: int = 1
    outer: Literal["inactive", "blocks", "attach", "frozen"] = "inactive"
    update_head: bool = True
    frozen: tuple[str, ...] = ()
    always_active: tuple[str, ...] = ()
    accumulation: Literal["last", "micro", "accumulate"] | None = None
    micro_batches: int | None = None
    clip: Literal["none", "value", "per_tensor", "delayed"] = "none"
    clip_norm: float = 1.0
    guard: bool = True
    warmup_after_switch: int = 0
    average: bool = False
    compat: Literal["blockoptimizers"] | None = None

    def __post_init__(self) -> None:
        if self.partition != "layer":
            if not isinstance(self.partition, (tuple, list)) or not self.partition:
                raise PlanError(
                    f"Blocks.partition is {self.partition!r}",
                    advice='allowed values: "layer" or a tuple of blocks, each a tuple of names',
                )
            given = tuple(_names("a block of Blocks.partition", b) for b in self.partition)
            object.__setattr__(self, "partition", given)
        choice("Blocks.order", self.order, ORDERS, ())
        choice("Blocks.reach", self.reach, ("deeper", "all"), ())
        choice("Blocks.outer", self.outer, ("inactive", "blocks", "attach", "frozen"), ())
        choice("Blocks.clip", self.clip, ("none", "value", "per_tensor", "delayed"), ())
        if self.accumulation is not None:
            choice("Blocks.accumulation", self.accumulation, ("last", "micro", "accumulate"), ())
        if self.compat is not None:
            choice("Blocks.compat", self.compat, ("blockoptimizers",), ())
        _number("Blocks.steps", self.steps, 1, whole=True)
        _number("Blocks.layers_per_block", self.layers_per_block, 1, whole=True)
        for name in ("seed", "start", "warmup_after_switch"):
            _number(f"Blocks.{name}", getattr(self, name), 0, whole=True)
        if self.micro_batches is not None:
            _number("Blocks.micro_batches", self.micro_batches, 1, whole=True)
        elif self.accumulation == "micro" and isinstance(self.inactive, SignSGD):
            raise PlanError(
                'SignSGD with accumulation="micro" moves weights once per backward',
                advice="give Blocks(micro_batches=n), the number of backwards per optimizer step",
            )
        _number("Blocks.clip_norm", self.clip_norm, 0)
        for name in ("frozen", "always_active"):
            object.__setattr__(self, name, _names(f"Blocks.{name}", getattr(self, name)))
        if self.inactive is not None and type(self.inactive) not in KINDS.values():
            raise PlanError(
                f"Blocks.inactive is {self.inactive!r}",
                advice="allowed values: None, fxmem.SGD, fxmem.SignSGD or fxmem.LowRank",
            )
        if self.compat and isinstance(self.inactive, LowRank):
            raise PlanError(
                'compat="blockoptimizers" is not available with LowRank: the released code also '
                "trains the term of the active block",
                advice="leave compat None",
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values; ``inactive`` is a table with its ``kind``."""
        data: dict[str, Any] = asdict(self)
        data = {k: _plain(v) for k, v in data.items()}
        for kind, cls in KINDS.items():
            if type(self.inactive) is cls:
                options = {k: _plain(v) for k, v in asdict(self.inactive).items()}
                data["inactive"] = {"kind": kind, **options}
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Blocks:
        """Build from `to_dict`'s result; fields left out take their defaults.

        Raises:
            PlanError: `data` is no mapping, or has an unknown name or an impossible value.
        """
        values = mapping(cls, data)
        inactive = values.get("inactive")
        if isinstance(inactive, Mapping):
            options = dict(inactive)
            kind = options.pop("kind", None)
            if not isinstance(kind, str) or kind not in KINDS:
                raise PlanError(
                    f"kind of inactive is {kind!r}", advice=f"allowed: {', '.join(KINDS)}"
                )
            values["inactive"] = KINDS[kind](**mapping(KINDS[kind], options))
        return cls(**values)


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


__all__ = ["KINDS", "SGD", "Blocks", "LowRank", "SignSGD"]
