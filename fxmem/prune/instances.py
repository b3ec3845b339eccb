"""Many sub-models of one model through one compiled forward with dynamic widths.

The parameters are inputs of the compiled function and their cut axes are dynamic sizes, so a new
sub-model costs its slices and no compilation.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fxmem import _compat
from fxmem.errors import MaskError
from fxmem.prune.attributes import Attributes, apply, attributes
from fxmem.prune.inert import padded, silence
from fxmem.prune.masks import Masks
from fxmem.prune.materialize import coupling as couple
from fxmem.prune.slicing import cut, slices
from fxmem.prune.units import Coupling

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
        self.cut_axes = {(n, i) for g in coupling.groups for n, i, _ in g.members}
        self.instantiations = 0
        self.skeleton = _hollow(model)
        self.buffers = {n: b.to(self.device) for n, b in model.named_buffers()}
        self.backend = compile
        self.run: Callable[..., Any] = self._forward
        if compile:
            name = "inductor" if compile is True else compile
            self.run = torch.compile(self._forward, backend=name, isolate_recompiles=True)  # type: ignore[call-overload]

    def _forward(self, parameters: dict[str, Tensor], batch: dict[str, Any]) -> Any:
        return functional_call(self.skeleton, parameters, (), batch, tie_weights=True)

    def __call__(self, masks: Masks) -> Callable[[Batch], Any]:
        """A sub-model as ``callable(batch)``: keyword arguments of the forward -> its output."""
        model = self.model()
        if model is None:
            raise MaskError("the dense model of these sub-models no longer exists")
        masks, bare = padded(model, self.coupling, masks.completed(self.coupling))
        silent = {name for g in bare for name, _, _ in g.consumer}
        parts = slices(self.coupling, masks)
        values: dict[str, Tensor] = dict(self.buffers)
        for name, p in model.named_parameters():
            t = cut(p.detach(), parts[name]) if name in parts else p.detach()
            t = t.to(self.device, copy=name in silent)
            for axis in range(t.dim()):
                if (name, axis) in self.cut_axes and t.shape[axis] > 1:
                    _compat.mark_axis_dynamic(t, axis)
            values[name] = t
        if bare:
            silence(values, self.coupling, masks, bare)
        self.instantiations += 1

        def call(batch: Batch) -> Any:
            apply(self.skeleton, self.found, masks)
            return self.run(values, dict(batch))

        return call


def _hollow(model: nn.Module) -> nn.Module:
    """A copy of the module tree whose parameters are on meta and take no memory."""
    memo: dict[int, Any] = {}
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
