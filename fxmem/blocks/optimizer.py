"""AdamW on the active block, with float32 masters that live for one visit."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from fxmem.blocks.attach import state_of
from fxmem.blocks.state import BlockState
from fxmem.errors import BlockStateError


class BlockAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) on the active block of a model with a block state.

    Moments, bias correction and float32 masters restart at every visit. The groups hold all
    trainable parameters and never change; decay spares parameters of fewer than two axes.

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
    ) -> None:
        self.blocks: BlockState = state_of(model)
        trainable = [p for p in model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
        ]
        defaults = {"lr": lr, "betas": betas, "eps": eps}
        super().__init__([g for g in groups if g["params"]], defaults)
        self._base_lr = lr

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step on the active block; at the end of a visit its state and gradients go.

        Raises:
            BlockStateError: a closure was given.
        """
        if closure is not None:
            raise BlockStateError("a closure would repeat updates made inside the backward")
        active = self.blocks.active
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and self.blocks.names[p] in active:
                    self._adamw(p, group)
        ended = self.blocks.advance()
        if ended:
            for p in list(self.state):
                del self.state[p]
                p.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients; also the point where a new learning rate reaches inactive updates."""
        super().zero_grad(set_to_none)
        self.sync_lr()

    def sync_lr(self) -> None:
        """Scale the step size of inactive updates like the learning rate of the first group."""
        if self._base_lr:
            self.blocks.lr_scale = float(self.param_groups[0]["lr"]) / self._base_lr

    def _adamw(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        wide = torch.promote_types(p.dtype, torch.float32)
        if not state:
            state["step"] = 0
            state["master"] = p.detach().to(wide, copy=True)
            state["m"], state["v"] = (torch.zeros_like(p, dtype=wide) for _ in range(2))
        assert p.grad is not None
        grad, (b1, b2) = p.grad.to(wide), group["betas"]
        state["step"] += 1
        master, m, v = state["master"], state["m"], state["v"]
        master.mul_(1 - group["lr"] * group["weight_decay"])
        m.lerp_(grad, 1 - b1)
        v.mul_(b2).addcmul_(grad, grad, value=1 - b2)
        root = (v.sqrt() / (1 - b2 ** state["step"]) ** 0.5).add_(group["eps"])
        master.addcdiv_(m, root, value=-group["lr"] / (1 - b1 ** state["step"]))
        p.copy_(master)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resume needs, as tensors and plain values."""
        return super().state_dict() | {
            "blocks": self.blocks.state_dict() | {"lr_scale": self.blocks.lr_scale}
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict`; masters and moments keep their dtype.

        Raises:
            BlockStateError: it is of another partition, schedule or update; nothing is changed.
        """
        saved = state_dict.get("blocks")
        if saved is None:
            raise BlockStateError("the saved state is not of BlockAdamW")
        self.blocks.check(saved)
        super().load_state_dict({k: state_dict[k] for k in ("state", "param_groups")})
        flat = [p for group in self.param_groups for p in group["params"]]
        # the base class casts to the parameter's dtype, which would round the masters
        for index, entry in state_dict["state"].items():
            p = flat[index]
            for name, value in entry.items():
                tensor = isinstance(value, torch.Tensor)
                self.state[p][name] = value.to(p.device, copy=True) if tensor else deepcopy(value)
        self.blocks.step = saved["global_step"]
        self.blocks.lr_scale = saved["lr_scale"]
