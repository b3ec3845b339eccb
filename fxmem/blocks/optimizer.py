"""AdamW on the active block, with float32 masters that live for one visit."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxmem.blocks import saved as saved_state
from fxmem.blocks.attach import state_of
from fxmem.blocks.policies import average_gradients
from fxmem.blocks.shards import cut, is_shard, local, mean_of_ranks, total_norm
from fxmem.blocks.state import BlockState
from fxmem.distributed.whole import unwrapped
from fxmem.errors import BlockStateError
from fxmem.kernels.registry import find
from fxmem.plan.blocks import SGD, LowRank, SignSGD

GROUPS = ("decay", "no_decay", "up", "down")


class BlockAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) on the active block of a model with ``Plan(blocks=...)``.

    Moments, bias correction and float32 masters restart at every visit (BAdam, arXiv 2404.02827).
    Low-rank terms of inactive matrices learn by Adam whose moments stay for the run (BREAD). The
    groups ``decay``, ``no_decay`` (fewer than two axes), ``up`` and ``down`` (low-rank terms) hold
    everything that can learn and never change, so schedulers work as usual; the learning rate of
    the first group over ``lr`` scales the updates of inactive weights.

    Args:
        model: a model from ``fxmem.transform`` with ``Plan(blocks=...)``, wrapped by
            DistributedDataParallel or not.
        lr: learning rate of the active block.
        betas: as in torch.optim.AdamW.
        eps: as in torch.optim.AdamW.
        weight_decay: as in torch.optim.AdamW; low-rank terms do not decay.
        max_grad_norm: largest global norm of the gradients that AdamW takes, low-rank terms and
            the average over processes included; `grad_norm` has that of the latest step. Clipping
            ``model.parameters()`` before the step misses both.

    A model has one optimizer; a newer one takes the place of an older one.

    Raises:
        NotTransformedError: the model has no block state.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        max_grad_norm: float | None = None,
    ) -> None:
        model = unwrapped(model)
        self.blocks: BlockState = state_of(model)
        self.blocks.optimizer = lambda: None
        self.blocks.follow()
        named = [(n, p) for p, n in self.blocks.names.items() if p.requires_grad]
        thin = 1 if self.blocks.plan.compat is None else -1
        members: dict[str, list[tuple[str, nn.Parameter]]] = {
            "decay": [(n, p) for n, p in named if p.ndim > thin and not _is_bias(n)],
            "up": [(f"{n}.up", a.up) for n, a in self.blocks.adapters.items()],
            "down": [(f"{n}.down", a.down) for n, a in self.blocks.adapters.items()],
        }
        decayed = {n for n, _ in members["decay"]}
        members["no_decay"] = [(n, p) for n, p in named if n not in decayed]
        self._names: dict[Tensor, str] = {p: n for group in members.values() for n, p in group}
        rates = self._rates(lr)
        groups = [
            {"params": [p for _, p in members[kind]], "name": kind, "lr": rates[kind],
             "weight_decay": weight_decay if kind == "decay" else 0.0}
            for kind in GROUPS if members[kind]
        ]  # fmt: skip
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        self._base_lr, self._max_grad_norm = lr, max_grad_norm
        self.grad_norm: Tensor | None = None
        self._model = weakref.ref(model)
        self.blocks.lr_scale = self._lr_scale
        self.blocks.optimizer = weakref.ref(self)

    def _rates(self, lr: float) -> dict[str, float]:
        rates = {"decay": lr, "no_decay": lr}
        plan = self.blocks.plan.inactive
        if isinstance(plan, LowRank):
            rates["down"] = lr if plan.lr is None else plan.lr
            rates["up"] = plan.ratio * rates["down"]
        return rates

    def _lr_scale(self) -> float:
        """The learning rate now over the one at the start; 0 where training starts at 0."""
        now = float(self.param_groups[0]["lr"])
        return now / self._base_lr if self._base_lr else 0.0

    def check_parameters(self) -> None:
        """Refuse to train parameters that are not those of the model any more.

        Raises:
            BlockStateError: the groups hold others (sharded or flattened ones, say).
        """
        if any(p not in self._names for group in self.param_groups for p in group["params"]):
            raise BlockStateError(
                "the optimizer's parameters were replaced, as DeepSpeed's ZeRO and FSDP1 do",
                advice="shard the model by fully_shard, or train on one process or on several with "
                "Blocks(average=True)",
            )

    def adopt(self, parameters: Mapping[str, nn.Parameter]) -> bool:
        """Know the parameters of the model by new objects; False where the groups hold others."""
        names: dict[Tensor, str] = {p: n for n, p in parameters.items()}
        names |= {p: n for p, n in self._names.items() if n not in parameters}
        held = [p for group in self.param_groups for p in group["params"]]
        if {names.get(p) for p in held} != set(self._names.values()):
            return False
        by_name = {names[p]: p for p in held}
        moved = {by_name[self._names[p]]: entry for p, entry in self.state.items()}
        self._names = {p: n for n, p in by_name.items()}
        self.state.clear()
        self.state.update({p: _copied(entry, p) for p, entry in moved.items()})
        return True

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Read by torch.amp.GradScaler before a step with a scaled loss."""
        if isinstance(self.blocks.plan.inactive, (SGD, SignSGD)):
            raise BlockStateError(
                "a GradScaler scales the loss, and with it the updates inside the backward",
                advice="use bfloat16, or Blocks(inactive=None) or LowRank",
            )
        return False

    def _check(self, closure: Any) -> None:
        if closure is not None:
            raise BlockStateError("a closure would repeat updates made inside the backward")
        model = self._model()
        if self.blocks.optimizer() is not self or (
            model is not None and state_of(model) is not self.blocks
        ):
            raise BlockStateError(
                "the model has another optimizer or was transformed anew since this one was made",
                advice="make one BlockAdamW, after fxmem.transform",
            )
        self.check_parameters()
        held = [p for group in self.param_groups for p in group["params"]]
        idle = any(self._names[p] not in self.blocks.active for p in held)
        if idle and all(p.grad is not None for p in held):
            raise BlockStateError(
                "all parameters have gradients, inactive ones too: a step that fills the state of "
                "an optimizer (torch.distributed.checkpoint.state_dict) would count as one",
                advice="save optimizer.state_dict() as it is, and load into blank_state_dict(...)",
            )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step on the active block; at the end of a visit its state and gradients go.

        A gradient that is not finite skips the step of the active block and of low-rank terms,
        which still counts as a step of the schedule.

        Raises:
            BlockStateError: a closure was given, the model has another optimizer by now, its
                parameters were replaced, or all of them have gradients.
        """
        self._check(closure)
        blocks = self.blocks
        blocks.finish_backwards()
        active = blocks.active
        pairs = [
            (p, group)
            for group in self.param_groups
            for p in group["params"]
            if group["name"] in ("up", "down") or self._names[p] in active
        ]
        if blocks.averages:
            blocks.average()
        elif blocks.sharded is not None:  # low-rank terms, of which no engine knows
            beside = partial(mean_of_ranks, beside=blocks.sharded)
            average_gradients([p for p, _ in pairs if not is_shard(p)], beside)
        pairs = [(p, group) for p, group in pairs if p.grad is not None]
        grads = [p.grad for p, _ in pairs if p.grad is not None]
        if blocks.plan.guard:
            for grad in grads:
                blocks.guard.check(grad)
        if self._max_grad_norm is not None:
            self.grad_norm = total_norm(grads)
            factor = (self._max_grad_norm / (self.grad_norm + 1e-6)).clamp_max(1.0)
            for grad in grads:
                local(grad).mul_(factor.to(grad.device))
        if not (blocks.plan.guard and blocks.guard.raised()):
            for p, group in pairs:
                self._adamw(p, group, self._warmup(group))
        # the user's zero_grad may know the model's parameters only
        for group in self.param_groups:
            if group["name"] in ("up", "down"):
                for p in group["params"]:
                    p.grad = None
        if blocks.advance():
            self._end_visit()

    def _end_visit(self) -> None:
        keep = set(self.blocks.parts.always)
        restart = self.blocks.plan.compat is not None
        for group in self.param_groups:
            for p in group["params"]:
                kept = group["name"] in ("up", "down") and not restart
                if kept or self._names[p] in keep:
                    continue
                self.state.pop(p, None)
                p.grad = None

    def _warmup(self, group: dict[str, Any]) -> float:
        steps = self.blocks.plan.warmup_after_switch
        if not steps or group["name"] in ("up", "down"):
            return 1.0
        inside = self.blocks.schedule.visit(self.blocks.step)[1]
        return min(1.0, (inside + 1) / steps)

    @staticmethod
    def _fresh(p: Tensor) -> dict[str, Any]:
        wide = torch.promote_types(p.dtype, torch.float32)
        state: dict[str, Any] = {"step": 0}
        # a weight in float32 or wider is its own master
        if wide is not p.dtype:
            state["master"] = p.detach().to(wide, copy=True)
        return state | {k: torch.zeros_like(p.detach(), dtype=wide) for k in ("m", "v")}

    def _adamw(self, p: Tensor, group: dict[str, Any], factor: float) -> None:
        state = self.state[p] = self.state.get(p) or self._fresh(p)
        assert p.grad is not None
        (b1, b2), lr = group["betas"], group["lr"] * factor
        state["step"] += 1
        master, copy = (state["master"], local(p)) if "master" in state else (p, None)
        find("adamw")(
            local(master), local(p.grad), local(state["m"]), local(state["v"]), copy,
            step=state["step"], lr=lr, beta1=b1, beta2=b2, eps=group["eps"],
            weight_decay=group["weight_decay"],
        )  # fmt: skip
        if is_shard(p):  # whose local tensor has a version of its own
            torch.autograd.graph.increment_version(p)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resume needs, as tensors and plain values; keyed by names."""
        return {
            "state": {self._names[p]: dict(entry) for p, entry in self.state.items()},
            "param_groups": [
                {k: [self._names[p] for p in v] if k == "params" else v for k, v in group.items()}
                for group in self.param_groups
            ],
            "blocks": saved_state.state_dict(self.blocks) | {
                "base_lr": self._base_lr, "moments": sorted(self._names[p] for p in self.state),
            },
        }  # fmt: skip

    def blank_state_dict(self, blocks: Mapping[str, Any]) -> dict[str, Any]:
        """A `state_dict` with tensors to load into, as torch.distributed.checkpoint does: shaped as
        one whose ``"blocks"`` are these.
        """
        mine = {n: p for p, n in self._names.items()}
        state = {n: self._fresh(mine[n]) for n in blocks["moments"] if n in mine}
        return self.state_dict() | {"state": state, "blocks": deepcopy(dict(blocks))}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict`; masters and moments keep their dtype.

        Raises:
            BlockStateError: it is of another partition, schedule or update; nothing is changed.
        """
        saved = state_dict.get("blocks")
        if saved is None:
            raise BlockStateError("the saved state is not of BlockAdamW")
        saved_state.check(self.blocks, saved)
        groups = state_dict["param_groups"]
        mine = {n: p for p, n in self._names.items()}
        if [g["params"] for g in groups] != [
            [self._names[p] for p in g["params"]] for g in self.param_groups
        ]:
            raise BlockStateError("the saved parameter groups hold other parameters")
        # values may be this optimizer's own, so they are copied before anything is dropped
        entries = {n: _copied(entry, mine[n]) for n, entry in state_dict["state"].items()}
        for group, loaded in zip(self.param_groups, groups, strict=True):
            group.update({k: deepcopy(v) for k, v in loaded.items() if k != "params"})
        self.state.clear()
        for n, entry in entries.items():
            self.state[mine[n]] = entry
        self._base_lr = float(saved["base_lr"])
        saved_state.load(self.blocks, saved)


class BlockAdamWFactory:
    """Makes a `BlockAdamW` of the model of transformers' Trainer, once that is transformed:
    ``Trainer(..., callbacks=[fxmem.TrainerCallback(plan)],
    optimizer_cls_and_kwargs=(fxmem.BlockAdamWFactory, {"lr": 1e-5}))``.
    """

    def __call__(self, model: nn.Module, **options: Any) -> BlockAdamW:
        """`options` are those of `BlockAdamW`."""
        return BlockAdamW(model, **options)


def _copied(entry: dict[str, Any], p: Tensor) -> dict[str, Any]:
    return {
        k: cut(v.detach().to(p.device, copy=True), p) if isinstance(v, Tensor) else v
        for k, v in entry.items()
    }


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2] == "bias"


__all__ = ["BlockAdamW", "BlockAdamWFactory"]
