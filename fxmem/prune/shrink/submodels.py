"""Many sub-models of one model through one compiled forward with dynamic widths.

The parameters are inputs of the compiled function and their cut axes are dynamic sizes, so a new
sub-model costs its slices and no compilation.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fxmem._compat.varying import mark_axis_dynamic
from fxmem.errors import MaskError
from fxmem.frontend.experts import odd_experts, streamable
from fxmem.plan.carry import left_behind
from fxmem.prune.coupling.match_norms import epsilons, rescale
from fxmem.prune.shrink.empty_layers import padded, silence
from fxmem.prune.shrink.gates import gated, gates
from fxmem.prune.shrink.masked import unowned
from fxmem.prune.shrink.materialize import coupling as couple
from fxmem.prune.shrink.size_attributes import Attributes, apply, attributes, cuts_width
from fxmem.prune.shrink.slicing import buffer_slices, cut, slices
from fxmem.prune.units.masks import Masks
from fxmem.prune.units.units import Coupling

Batch = Mapping[str, Any]


class Instances:
    """The sub-models of one model.

    Attributes:
        model: the dense model, read only when a sub-model is cut.
        instantiations: sub-models made so far.
    """

    def __init__(
        self, model: nn.Module, coupling: Coupling, device: torch.device | str | None = None,
        compile: bool | str = "inductor",
    ) -> None:  # fmt: skip
        self.model = weakref.ref(model)
        self.coupling = coupling
        self.device = torch.device(device) if device else next(model.parameters()).device
        self.found: Attributes = attributes(model, coupling)
        self.unowned = unowned(coupling)
        self.cut_axes = {(n, i) for g in coupling.groups for n, i, _ in g.members}
        self.instantiations = 0
        self.narrow = False
        self.skeleton = _hollow(model)
        self.buffers = {n: b.to(self.device) for n, b in model.named_buffers()}
        self.backend = compile
        self.run: Callable[..., Any] = self._forward
        if compile:
            name = "inductor" if compile is True else compile
            self.run = torch.compile(self._forward, backend=name, isolate_recompiles=True)  # type: ignore[call-overload]

    def _forward(self, parameters: dict[str, Tensor], batch: dict[str, Any]) -> Any:
        return functional_call(self.skeleton, parameters, (), batch, tie_weights=True)

    def _narrow(self, model: nn.Module, masks: Masks) -> None:
        """Prepare for widths: eps becomes an input of the graph, no value is compiled in."""
        self.found = attributes(model, self.coupling, masks)
        for path, attribute, eps in epsilons(self.coupling, Masks.full(self.coupling)):
            module = self.skeleton.get_submodule(path)
            delattr(module, attribute)
            module.register_buffer(attribute, torch.tensor(eps), persistent=False)
        self.narrow = True

    def _shapes(self, values: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """The shapes that torch's own RMSNorm modules hold, by module path."""
        return {
            path: tuple(values[f"{path}.weight"].shape)
            for path, module in self.skeleton.named_modules()
            if isinstance(module, nn.RMSNorm) and f"{path}.weight" in values
        }

    def __call__(self, masks: Masks) -> Callable[..., Any]:
        """A sub-model as ``callable(batch)``: keyword arguments of the forward -> its output.

        ``callable(batch, inside)`` runs it, uncompiled, with the units off that the masks
        ``inside`` (of the dense model) do not keep.
        """
        model = self.model()
        if model is None:
            raise MaskError("the dense model of these sub-models no longer exists")
        masks, bare = padded(model, self.coupling, masks.on(self.coupling))
        if not self.narrow and cuts_width(self.coupling, masks):
            self._narrow(model, masks)
        silent = {name for g in bare for name, _, _ in g.consumer}
        parts = slices(self.coupling, masks)
        values: dict[str, Tensor] = dict(self.buffers)
        for name, kept in buffer_slices(self.coupling, masks).items():
            values[name] = cut(self.buffers[name], kept)
        for name, p in model.named_parameters():
            t = cut(p.detach(), parts[name]) if name in parts else p.detach()
            t = t.to(self.device, copy=name in silent)
            for axis in range(t.dim()):
                if (name, axis) in self.cut_axes and t.shape[axis] > 1:
                    mark_axis_dynamic(t, axis)
            values[name] = t
        if bare:
            silence(values, self.coupling, masks, bare)
        rescale(values, self.coupling, masks)
        shapes: dict[str, tuple[int, ...]] = {}
        if self.narrow:
            for path, attribute, eps in epsilons(self.coupling, masks):
                eps_now = torch.tensor(eps, dtype=torch.float64, device=self.device)
                values[f"{path}.{attribute}"] = eps_now
            shapes = self._shapes(values)
        self.instantiations += 1
        odd = bool(odd_experts(values, self.skeleton))

        def call(batch: Batch, inside: Masks | None = None) -> Any:
            apply(self.skeleton, self.found, masks)
            for path, shape in shapes.items():
                setattr(self.skeleton.get_submodule(path), "normalized_shape", shape)  # noqa: B010
            # grouped products cannot read rows at odd places
            with streamable(self.skeleton) if odd else contextlib.nullcontext():
                if inside is None:
                    return self.run(values, dict(batch))
                closed = gates(self.coupling, masks, inside)
                with gated(self.skeleton, values, closed, self.unowned) as own:
                    return self._forward(own, dict(batch))

        return call


def _hollow(model: nn.Module) -> nn.Module:
    """A copy of the module tree whose parameters are on meta and take no memory."""
    memo: dict[int, Any] = dict(left_behind(model))
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to("meta"), requires_grad=False)

    copied: nn.Module = copy.deepcopy(model, memo)
    return copied


_ENGINES: weakref.WeakKeyDictionary[nn.Module, dict[Any, Instances]] = weakref.WeakKeyDictionary()


def instantiate(
    model: nn.Module, masks: Masks, coupling: Coupling | None = None, *,
    device: torch.device | str | None = None, compile: bool | str = "inductor",
) -> Callable[[Batch], Any]:  # fmt: skip
    """A sub-model of ``model`` to run forward: ``callable(batch)``, ``batch`` keyword arguments.

    All sub-models of a model share one compiled graph; a count of zero or one unit costs one more
    graph. The dense model stays where it is, only slices go to ``device``. ``compile``: a
    torch.compile backend, or False for none.

    Raises:
        MaskError: masks of another model.
    """
    plan = couple(model) if coupling is None else coupling
    masks.check(plan)
    table = _ENGINES.setdefault(model, {})
    key = (masks.model, str(device), compile)
    if key not in table:
        table[key] = Instances(model, plan, device, compile)
    return table[key](masks)
