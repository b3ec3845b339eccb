"""The private names of PyTorch's FSDP2 (``fully_shard``), as what streaming asks of it.

FSDP2 keeps the parameters of each group of modules as shards, and one persistent tensor per
parameter that is whole while the group is open; its storage is empty else. Its module hooks open
and close groups, and reduce gradients. Here the same calls can be made without the hooks.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "Group", "Hooks", "dtensor_parameter", "fsdp1_module", "group_of", "hooks_of", "is_sharded",
    "replicated", "set_hooks", "traced_hooks", "zero3_parameter",
]  # fmt: skip


def is_sharded(module: nn.Module) -> bool:
    """``fully_shard`` was applied to the module itself."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def fsdp1_module(model: nn.Module) -> str | None:
    """Name of a submodule that is wrapped by the older FullyShardedDataParallel."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return None
    found = (n for n, m in model.named_modules() if isinstance(m, fsdp.FullyShardedDataParallel))
    return next(found, None)


def replicated(model: nn.Module) -> bool:
    """``replicate`` was applied, which hangs DistributedDataParallel on the module's hooks."""
    if "torch.distributed._composable.replicate" not in sys.modules:
        return False
    contract = importlib.import_module("torch.distributed._composable.contract")
    found = map(contract._get_registry, model.modules())
    return any("replicate" in (registry or ()) for registry in found)


def dtensor_parameter(model: nn.Module) -> str | None:
    """Name of a parameter that is a DTensor: a part of it is on another rank."""
    tensor = sys.modules.get("torch.distributed.tensor")
    if tensor is None:
        return None
    return next((n for n, p in model.named_parameters() if isinstance(p, tensor.DTensor)), None)


def zero3_parameter(model: nn.Module) -> str | None:
    """Name of a parameter that DeepSpeed's ZeRO-3 has partitioned."""
    if "deepspeed" not in sys.modules:
        return None
    return next((n for n, p in model.named_parameters() if hasattr(p, "ds_status")), None)


def _state(module: nn.Module) -> Any:
    from torch.distributed._composable_state import _get_module_state

    return _get_module_state(module)


def group_of(module: nn.Module, known: dict[Any, Group]) -> Group:
    """The group that opens and closes with ``module``; ``known``: by FSDP2's state."""
    state = _state(module)
    if state not in known:
        known[state] = Group(state)
    return known[state]


class Group:
    """What one call of ``fully_shard`` made: modules whose parameters are gathered together."""

    def __init__(self, state: Any) -> None:
        self._state = state
        self._waiting: list[Any] = []

    @property
    def _parameters(self) -> Iterator[Any]:
        return (p for g in self._state._fsdp_param_groups for p in g.fsdp_params)

    def whole(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The whole parameters, of empty storage while the group is closed, each with this rank's
        shard. Those that FSDP2 has not made yet are made, without communication.
        """
        for group in self._state._fsdp_param_groups:
            for p in group.fsdp_params:
                if not hasattr(p, "_unsharded_param"):
                    given = p.all_gather_inputs
                    numbers = [t.numel() for t in given], [t.dtype for t in given]
                    size = getattr(group.mesh_info, "shard_mesh_size", 1)
                    p.init_all_gather_outputs(*numbers, size, group.device)
                    p.init_unsharded_param()
                    p.free_unsharded_param()
                p._unsharded_param.requires_grad_(p.sharded_param.requires_grad)
                yield p._unsharded_param, p.sharded_param

    @property
    def place(self) -> tuple[list[Any], torch.device] | None:
        """The process groups along each dimension of its mesh, and where it computes; None where it
        has no parameters.
        """
        for group in self._state._fsdp_param_groups:
            return group.mesh_info.mesh.get_all_groups(), group.device
        return None

    @property
    def ranks(self) -> int:
        """That each have a part of a parameter."""
        infos = (group.mesh_info for group in self._state._fsdp_param_groups)
        return max((getattr(info, "shard_mesh_size", 1) for info in infos), default=1)

    @property
    def stays(self) -> bool:
        """Its parameters are still whole after their last use in a forward."""
        return not any(g._reshard_after_forward for g in self._state._fsdp_param_groups)

    @property
    def tensor_parallel(self) -> bool:
        """Its parameters are parts of larger ones even when the group is open."""
        return any(p.is_dtensor for p in self._parameters)

    def show(self) -> None:
        """The modules have the whole parameters as theirs."""
        for p in self._parameters:
            p._setattr_on_modules(p._unsharded_param)

    def hide(self) -> None:
        """The modules have what the state of the group says."""
        for group in self._state._fsdp_param_groups:
            if not group.is_unsharded:
                for p in group.fsdp_params:
                    p._setattr_on_modules(p.sharded_param)

    def wait(self, let_go: Callable[[], None]) -> None:
        """Of a group that has stayed: modules have what they would have had it not, so that
        ``zero_grad`` finds the shards; and who calls one lets go first.
        """

        def called(*_: Any) -> None:
            let_go()

        if not self.stays:
            for p in self._parameters:
                p._setattr_on_modules(p.sharded_param)
            self._waiting += [
                m.register_forward_pre_hook(called, prepend=True) for m in self._state._modules
            ]

    @property
    def is_open(self) -> bool:
        """Its parameters are whole: what reads shards by name, as a ``state_dict``, closes it."""
        return all(group.is_unsharded for group in self._state._fsdp_param_groups)

    def open(self, args: tuple[Any, ...] = (), kwargs: Any = None) -> tuple[Any, Any]:
        """Gather the parameters; the arguments of the call, cast by the policy of precision."""
        given = self._state._pre_forward(self._state._modules[0], args, kwargs or {})
        return given[0], given[1]

    def close(self, output: Any = (), *, stay: bool = False) -> Any:
        """After the last use in a forward. The backward of ``output`` gathers again. ``stay``: the
        parameters are whole until :meth:`let_go`.
        """
        after = [(g, g.post_forward_mesh_info) for g in self._state._fsdp_param_groups]
        for group, _ in after if stay else ():
            group.post_forward_mesh_info = None
        try:
            return self._state._post_forward(self._state._modules[0], (), output)
        finally:
            for group, mesh in after:
                group.post_forward_mesh_info = mesh

    def let_go(self, output: Any = ()) -> Any:
        """Close what has stayed. The backward of ``output``, made since, gathers again."""
        while self._waiting:
            self._waiting.pop().remove()
        for group in self._state._fsdp_param_groups:
            if group.is_unsharded:
                # as after a forward, so that the backward gathers from the same ranks as others'
                with group.use_training_state(type(group._training_state).FORWARD):
                    group.reshard()
        return self._state._cast_output_dtype(self._state._register_pre_backward_hook(output))

    def open_backward(self) -> None:
        """Gather for the backward, unless that is done."""
        groups = self._state._fsdp_param_groups
        if any(_name(g) != "PRE_BACKWARD" for g in groups) or _name(self._state) != "PRE_BACKWARD":
            self._state._pre_backward(None)

    def reduce(self) -> None:
        """Reduce what is in ``grad`` of the whole parameters, and close them."""
        for group in reversed(self._state._fsdp_param_groups):
            group.post_backward()

    @property
    def in_backward(self) -> bool:
        """A backward has begun and not ended."""
        return _name(self._state) == "PRE_BACKWARD"

    def reset(self) -> None:
        """Close all groups below this one, as before the call that failed; what a backward that
        failed has left of gradients goes."""
        broken = self.in_backward
        if not self._state._is_root:
            return
        for state in self._state._state_ctx.all_states:
            for group in state._fsdp_param_groups if broken else ():
                for p in group.fsdp_params:
                    p.unsharded_accumulated_grad = None
                    if hasattr(p, "_unsharded_param"):
                        p._unsharded_param.grad = None
        self._state._reset_iter_state()

    def hooks(self) -> set[int]:
        """Ids of FSDP2's hooks on the group's modules."""
        found = self._state._pre_forward_hook_handle, self._state._post_forward_hook_handle
        return {h.id for handle in found for h in getattr(handle, "handles", (handle,))}

    @functools.cached_property
    def casts(self) -> tuple[Callable[..., Any] | None, Callable[..., Any] | None]:
        """Hooks that cast a module's inputs and outputs as the policy of precision says."""
        policy = self._state._mp_policy
        into = policy.param_dtype if policy.cast_forward_inputs else None
        return _cast_inputs(into), _cast_output(policy.output_dtype)


def _name(state: Any) -> str:
    return str(state._training_state.name)


def _cast(dtype: torch.dtype, value: Any) -> Any:
    """As FSDP2 does: also in dataclasses."""
    from torch.distributed.utils import _apply_to_tensors

    return _apply_to_tensors(lambda x: x.to(dtype) if x.is_floating_point() else x, value)


def _cast_inputs(dtype: torch.dtype | None) -> Callable[..., Any] | None:
    if dtype is None:
        return None

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return _cast(dtype, args), _cast(dtype, kwargs)

    return hook


def _cast_output(dtype: torch.dtype | None) -> Callable[..., Any] | None:
    return None if dtype is None else lambda module, args, output: _cast(dtype, output)


Hooks = tuple[Any, Any, Any]


_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks")


def hooks_of(module: nn.Module) -> Hooks:
    """Forward pre-hooks, which of them take keywords, and forward hooks."""
    before, keywords, after = (vars(module)[name] for name in _HOOKS)
    return before, keywords, after


def set_hooks(module: nn.Module, hooks: Hooks) -> None:
    # what torch.compile makes of a module would set attributes of the module inside
    vars(module).update(zip(_HOOKS, hooks, strict=True))


def traced_hooks(module: nn.Module, group: Group) -> Hooks:
    """The module's hooks with casts in place of FSDP2's own."""
    own = group.hooks()
    before, keywords, after = (
        OrderedDict((k, v) for k, v in hooks.items() if k not in own) for hooks in hooks_of(module)
    )
    inputs, output = group.casts
    if inputs is not None:
        before[-1], keywords[-1] = inputs, True
        before.move_to_end(-1, last=False)
    if output is not None:
        after[-1] = output
    return before, keywords, after
