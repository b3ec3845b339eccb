"""Products with parameters: where a zero for a removed unit may stand.

The value of a unit is zero where a product reads it, either in the input of a module's call or in
the weight. The first is right only if that call is the product, of its own input; the second only
if what is multiplied is made of the weight by ops that keep its zeros.
"""

from __future__ import annotations

import inspect

from torch import fx, nn

from fxmem.prune.coupling.match_norms import module_of
from fxmem.prune.coupling.routers import LAYOUT
from fxmem.rules import lookup

KEEPS_ZERO = {
    "relu", "gelu", "silu", "tanh", "sin", "erf", "abs", "neg", "sign", "sqrt", "square", "div",
}  # fmt: skip
"""Pointwise ops that are zero where their first operand is."""


def keeps_zeros(node: fx.Node) -> bool:
    """Whether ``node``, made of one tensor, is zero where that tensor is."""
    row = lookup(node.target)
    name = str(node.target).split(".")[1] if str(node.target).startswith("aten.") else ""
    tensors = [a for a in node.args if isinstance(a, fx.Node)]
    if name in KEEPS_ZERO or name == "mul":
        return bool(node.args) and (name == "mul" or node.args[0] in tensors)
    if name == "pow":
        power = node.args[1]
        return node.args[0] in tensors and isinstance(power, int | float) and power > 0
    return row is not None and row.linear == 0


def is_call_of(model: nn.Module, name: str, product: fx.Node, value: fx.Node) -> bool:
    """Whether ``product`` is what a call of the parameter's module does with its only argument.

    Args:
        model: holds the module.
        name: of the parameter.
        product: the op that multiplies it.
        value: what it is multiplied with.
    """
    path = name.rpartition(".")[0]
    if not path or module_of(product) != path:
        return False

    def made_inside(node: fx.Node) -> bool:
        return node.op == "call_function" and f"{module_of(node)}.".startswith(f"{path}.")

    while made_inside(value) and str(value.target) in LAYOUT:
        value = value.args[0]
    forward = inspect.signature(type(model.get_submodule(path)).forward).parameters
    return not made_inside(value) and len(forward) == 2
