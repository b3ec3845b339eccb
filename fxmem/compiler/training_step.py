"""Whether the call that ``transform`` replaces is one that training makes."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

from torch import nn

from fxmem.errors import PlanError


def check_called(model: Any) -> None:
    """A trainer that calls ``training_step`` streams only where that calls the module itself.

    Raises:
        PlanError: it surely does not, or there is no forward to call.
    """
    if not isinstance(model, nn.Module):
        held = [n for n, m in getattr(model, "__dict__", {}).items() if isinstance(m, nn.Module)]
        raise PlanError(
            f"{type(model).__name__} is no torch.nn.Module, so nothing would stream",
            advice=f"transform the model that it trains: fxmem.transform(it.{held[0]}, plan)"
            if held else "give the model itself, fxmem.transform(model, plan)",
        )  # fmt: skip
    if type(model).forward is nn.Module.forward:
        raise PlanError(
            f"{type(model).__name__} has no forward, so nothing would stream", advice=_advice(model)
        )
    if callable(getattr(model, "training_step", None)) and not _calls(
        model, "training_step", set()
    ):
        raise PlanError(
            f"{type(model).__name__}.training_step does not call the module itself, so nothing "
            "would stream",
            advice=_advice(model),
        )


def _advice(model: nn.Module) -> str:
    sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in model.named_children()}
    if not sizes:
        return "transform the module whose forward gives the loss"
    name = max(sizes, key=lambda n: sizes[n])
    return f"transform the module that is called: fxmem.transform(model.{name}, plan)"


def _calls(model: nn.Module, method: str, seen: set[str]) -> bool:
    """The method, or one that it uses, takes the module as a value; True where nobody can tell."""
    seen.add(method)
    try:
        source = textwrap.dedent(inspect.getsource(getattr(type(model), method)))
        (function,) = ast.parse(source).body
    except (OSError, TypeError, ValueError, SyntaxError, AttributeError):
        return True
    if not isinstance(function, ast.FunctionDef) or not function.args.args:
        return True
    me = function.args.args[0].arg
    attributes = {id(n.value): n.attr for n in ast.walk(function) if isinstance(n, ast.Attribute)}
    used: list[Any] = [n for n in ast.walk(function) if isinstance(n, ast.Name) and n.id == me]
    if any(id(n) not in attributes for n in used):
        return True
    methods = {attributes[id(n)] for n in used} - seen - {"forward"}
    return any(
        _calls(model, name, seen)
        for name in sorted(methods)
        if inspect.isfunction(getattr(type(model), name, None)) and not hasattr(nn.Module, name)
    )


__all__ = ["check_called"]
