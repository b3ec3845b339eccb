"""RMSNorm by dataflow, and what a smaller residual stream changes in it.

The norm averages over the D channels of the stream. With D' of them left and the removed ones zero,
``mean' = mean D / D'``, so ``w' = w sqrt(D / D')`` and ``eps' = eps D / D'`` give the same output
exactly; where the norm multiplies by ``1 + w`` that sum is what grows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxmem.prune.units.masks import Masks
from fxmem.prune.units.units import Coupling, Norm
from fxmem.rewriting.patterns import CAST, behind, is_op, mean_square, mul

LAYER_NORM = ("aten.native_layer_norm.default", "aten.layer_norm.default")
FUSED = ("aten._fused_rms_norm.default", "aten.rms_norm.default")
_CASTS = (CAST, "aten.clone.default", "aten.alias.default")


@dataclass(frozen=True)
class Average:
    """One norm in the graph. ``uses``: the nodes that take its weight; ``reads``: its eps."""

    norm: Norm
    uses: fx.Node
    reads: fx.Node
    why: str
    """Reason that fixes the axis where it is not the residual stream."""


def match(
    node: fx.Node, origin: Mapping[fx.Node, str], model: nn.Module, where: str
) -> Average | str:
    """The norm that the averaging ``node`` belongs to, or why its axis must stay whole."""
    why = f"{where} needs the axis whole"
    op = str(node.target)
    if op in LAYER_NORM:
        return f"{why}: the mean of a LayerNorm includes removed channels, no smaller one is equal"
    if op in FUSED:
        found = _fused(node)
    elif op == "aten.mean.dim":
        found = _unfused(node)
    else:
        return why
    if found is None:
        return why
    reads, eps, scaled, weight = found
    source, offset = _weight(weight)
    if source not in origin or source.op != "placeholder" or source.meta["val"].dim() != 1:
        return f"{why}: no weight of its own takes up the factor of a smaller one"
    module = module_of(node)
    table = vars(model.get_submodule(module)) if module is not None else {}
    held = [k for k, v in table.items() if type(v) is float and v == eps]
    if module is None or len(held) != 1:
        return f"{why}: not one float attribute of its module holds its eps {eps}"
    width = int(source.meta["val"].shape[0])
    norm = Norm(origin[source], offset, module, held[0], float(eps), width)
    return Average(norm, scaled, reads, why)


_Found = tuple[fx.Node, float, fx.Node, fx.Node]


def _fused(node: fx.Node) -> _Found | None:
    names = ("input", "normalized_shape", "weight", "eps")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    weight, eps = given.get("weight"), given.get("eps")
    outputs = [u for u in users(node) if u.args[1:2] != (0,)]
    single = isinstance(node.meta.get("val"), Tensor)
    one = len(given["normalized_shape"]) == 1
    if not isinstance(weight, fx.Node) or type(eps) is not float or not one:
        return None
    return None if outputs and not single else (node, eps, node, weight)


def _unfused(mean: fx.Node) -> _Found | None:
    """``x -> x^2 -> mean -> + eps -> rsqrt -> * x -> * weight``, casts anywhere."""
    total = _only(mean)
    root = _only(total) if total is not None else None
    found = mean_square(root, *_CASTS)
    if root is None or found is None or found.mean is not mean or type(found.eps) is not float:
        return None
    normed = _only(root)
    factors = mul(normed, lambda a: behind(a, *_CASTS) is root)
    if normed is None or factors is None or behind(factors[1], *_CASTS) is not found.x:
        return None
    scaled = _only(normed)
    weighted = mul(scaled, lambda a: behind(a, *_CASTS) is normed)
    if scaled is None or weighted is None or not isinstance(weighted[1], fx.Node):
        return None
    return found.total, found.eps, scaled, weighted[1]


def _weight(node: fx.Node) -> tuple[fx.Node, bool]:
    """The parameter behind ``w`` or ``1 + w``."""
    node = behind(node, *_CASTS)
    if is_op(node, "aten.add.Tensor", "aten.add.Scalar") and not node.kwargs and 1 in node.args:
        rest = [a for a in node.args if isinstance(a, fx.Node)]
        if len(rest) == 1 and len(node.args) == 2:
            return behind(rest[0], *_CASTS), True
    return node, False


def _only(node: fx.Node) -> fx.Node | None:
    """The one node that takes ``node``'s value, past casts."""
    found = users(node)
    while len(found) == 1 and is_op(found[0], *_CASTS):
        found = users(found[0])
    return found[0] if len(found) == 1 else None


def users(node: fx.Node) -> list[fx.Node]:
    """Nodes that compute with ``node``: not its assertions, which have no value."""
    return [u for u in node.users if u.op == "output" or u.meta.get("val") is not None]


def module_of(node: fx.Node) -> str | None:
    """Path in the model of the module that ``node`` is computed in."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return None
    return str(stack[-1][0]).partition("@")[0].removeprefix("model").removeprefix(".")


def odd_use(averages: list[Average], graph: fx.Graph, origin: Mapping[fx.Node, str]) -> str | None:
    """Why rescaling would change more than these norms: a weight or eps used elsewhere."""
    taken: dict[str, set[fx.Node]] = {}
    for a in averages:
        taken.setdefault(a.norm.parameter, set()).add(a.uses)
    for node in graph.nodes:
        name = origin.get(node)
        if node.op == "placeholder" and name in taken:
            offsets = {a.norm.offset for a in averages if a.norm.parameter == name}
            if set(_uses(node)) - taken[name] or len(offsets) > 1:
                return f"{name} is the weight of a norm and used elsewhere"
    reads = {a.reads for a in averages}
    eps = {(a.norm.module, a.norm.eps) for a in averages}
    for node in graph.nodes:
        if node.op == "call_function" and node not in reads:
            floats = [v for v in node.args if type(v) is float]
            for value in floats:
                if (module_of(node), value) in eps:
                    return f"{node.target} in {module_of(node)} uses the eps of a norm"
    return None


def _uses(node: fx.Node) -> Iterator[fx.Node]:
    for user in users(node):
        if str(user.target) in _CASTS or _weight(user)[1]:
            yield from _uses(user)
        else:
            yield user


def rescale(parameters: Mapping[str, Tensor], coupling: Coupling, masks: Masks) -> None:
    """Multiply, in place, the cut norm weights by ``sqrt(units / kept units)``.

    Computed in float64 and rounded once to the weight's type, so masks applied in two steps differ
    from their composition by rounding.
    """
    for g in coupling.groups:
        kept = len(masks.kept(g.name))
        if not g.norms or kept == g.size:
            continue
        factor = (g.size / kept) ** 0.5
        for name, offset in dict.fromkeys((n.parameter, n.offset) for n in g.norms):
            weight = parameters[name]
            if weight.device.type == "meta":
                continue
            with torch.no_grad():
                w = weight.double()
                weight.copy_((1 + w) * factor - 1 if offset else w * factor)


def epsilons(coupling: Coupling, masks: Masks) -> Iterator[tuple[str, str, float]]:
    """(module path, attribute, eps) of every norm of the smaller model, whole widths too."""
    for g in coupling.groups:
        kept = len(masks.kept(g.name))
        for n in dict.fromkeys(g.norms):
            yield n.module, n.attribute, n.eps if kept == n.width else n.eps * n.width / kept


def set_epsilons(model: nn.Module, coupling: Coupling, masks: Masks) -> None:
    """Give the norms of a smaller model their eps, from that of the dense one."""
    for path, attribute, eps in epsilons(coupling, masks):
        setattr(model.get_submodule(path), attribute, eps)
