"""The block state that belongs to a model, kept outside the model."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from fxmem.errors import NotTransformedError

_STATES: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def attach(model: nn.Module, state: Any) -> None:
    """Let `state_of(model)` find `state`; replaces an earlier one."""
    _STATES[model] = state


def detach(model: nn.Module) -> None:
    """Forget the state of `model`, if any."""
    _STATES.pop(model, None)


def has_state(model: nn.Module) -> bool:
    """Whether a state is attached to `model`."""
    return model in _STATES


def state_of(model: nn.Module) -> Any:
    """The state attached to `model`.

    Raises:
        NotTransformedError: nothing is attached.
    """
    if model not in _STATES:
        raise NotTransformedError(
            "this model has no block state",
            advice="call fxmem.transform(model, fxmem.Plan(blocks=fxmem.Blocks(...))) first",
        )
    return _STATES[model]


def states() -> list[Any]:
    """The states of all models that have one."""
    return list(_STATES.values())
