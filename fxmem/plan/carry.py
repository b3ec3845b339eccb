"""What a copy or a pickle of a transformed model takes along: its plan.

``nn.Module`` leaves compiled calls out of copies, so without this a copy would train without
streaming and without a word. The plan hangs on the module; when it is copied or loaded, the copy
is transformed as well.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from fxmem._compat import graph as _compat
from fxmem.errors import FxmemWarning
from fxmem.plan.plan import Plan

NAME = "_fxmem_plan"
Install = Callable[[nn.Module, Plan], Any]


class Carried:
    """The plan of one module, which it follows into copies; the module itself is not held."""

    def __init__(self, model: nn.Module, plan: Plan, install: Install, group: Any = None) -> None:
        self.model, self.plan, self.install = weakref.ref(model), plan, install
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> Carried | None:
        # a copy of the module is in the memo before anything that hangs on it is copied
        return _taken(memo.get(id(self.model())), self.plan, self.install, self.group)

    def __reduce__(self) -> Any:
        return _taken, (self.model(), self.plan, self.install)  # ranks are those of a process


def _taken(
    model: nn.Module | None, plan: Plan, install: Install, group: Any = None
) -> Carried | None:
    """``model``, a copy that is being made, follows the plan as well."""
    if model is None:
        return None
    if plan.blocks is not None:
        warnings.warn(
            f"this copy of a {type(model).__name__} with Plan(blocks=...) trains as plain PyTorch: "
            "its blocks and its optimizer belong to the original; fxmem.transform(copy, plan) "
            "gives it its own",
            FxmemWarning, stacklevel=2,
        )  # fmt: skip
        return None
    if group is None and plan.stream is not None and plan.stream.sequence is not None:
        warnings.warn(
            f"this copy of a {type(model).__name__} streams in each process by itself: "
            "fxmem.transform(copy, plan, mesh=mesh) gives it the ranks of its sequence",
            FxmemWarning, stacklevel=2,
        )  # fmt: skip
    install(model, plan).group = group
    return Carried(model, plan, install, group)


def attach(model: nn.Module, plan: Plan, install: Install, group: Any = None) -> None:
    """Copies of ``model`` follow ``plan`` from now on: ``install(copy, plan)`` is called for
    each. ``group``: the ranks that stream its sequences together, for copies in this process.
    """
    model.__dict__[NAME] = Carried(model, plan, install, group)


def detach(model: nn.Module) -> None:
    """``model`` and its copies are plain."""
    _compat.unset_compiled_call(model)
    model.__dict__.pop(NAME, None)


def left_behind(model: nn.Module) -> dict[int, None]:
    """A memo for ``copy.deepcopy`` of ``model``, so that the copy is plain."""
    found = (m.__dict__.get(NAME) for m in model.modules())
    return {id(carried): None for carried in found if carried is not None}


__all__ = ["attach", "detach", "left_behind"]
