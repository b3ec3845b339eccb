"""Low-rank terms beside weights: ``x W^T`` becomes ``x W^T + s (x V^T) U^T``, traced with the
region.

Which matrix products read a weight follows from the data flow of the captured graph, through
transposes and casts, not from the class of a module. The gradients of ``U`` and ``V`` then come
from the joint trace like any other, and where nobody asks for the gradient of ``W`` no node forms
it (LoRA, Hu et al. 2021; as landscape expansion: BREAD, Luo et al., NeurIPS 2025).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxmem.errors import RoleError
from fxmem.frontend.canonicalize import Canonicalize
from fxmem.frontend.interpret import call_node
from fxmem.frontend.origin import module_path, name_of, source_line
from fxmem.frontend.regions import Region

_PRODUCTS: dict[Any, int] = {
    F.linear: 1, torch.matmul: 1, torch.mm: 1, operator.matmul: 1, "matmul": 1, "mm": 1,
    torch.addmm: 2, "addmm": 2,
}  # fmt: skip
"""Matrix products by target, and the position of the right-hand matrix."""
FLIPS = frozenset({"t", "transpose", "swapaxes", "swapdims", "permute", "T", "mT"})
_SAME = frozenset({"to", "contiguous", "float", "double", "half", "bfloat16", "type_as"})


@dataclass(slots=True)
class AdaptedRegion(Region):
    """A region whose last inputs are ``up`` and ``down`` of the weights at ``positions``."""

    positions: list[int]

    @classmethod
    def of(
        cls, region: Region, values: Sequence[Tensor], positions: Sequence[int]
    ) -> AdaptedRegion:
        """``values``: fake ``up, down`` of each position in order."""
        given = {f.name: getattr(region, f.name) for f in fields(Region) if f.init}
        given["values"] = [*region.values, *values]
        given["leaves"] = [*region.leaves, *(("adapter", str(i)) for i in range(len(values)))]
        return cls(**given, positions=list(positions))

    @property
    def parameter_mask(self) -> list[bool]:
        named = {("input", p.name) for p in self.capture.parameters}
        return [leaf in named or leaf[0] == "adapter" for leaf in self.leaves]

    def function(
        self, call: Callable[[fx.Node, Any, Any], Any] = call_node
    ) -> Callable[..., list[Any]]:
        plain = Region.function(self, call)
        count = 2 * len(self.positions)

        def fn(*values: Any) -> list[Any]:
            if isinstance(call, LowRank):
                pairs = values[len(values) - count :]
                call.adapters = dict(
                    zip(self.positions, zip(pairs[::2], pairs[1::2], strict=True), strict=True)
                )
            return plain(*values)

        return fn


class LowRank(Canonicalize):
    """Canonical form with the low-rank term at every product with an adapted weight.

    Raises:
        RoleError: such a weight is read by something else than a matrix product.
    """

    def __init__(self, region: AdaptedRegion, scales: Mapping[int, float]) -> None:
        super().__init__()
        self.adapters: dict[int, tuple[Tensor, Tensor]] = {}
        self._scales = dict(scales)
        self._weights: dict[fx.Node, tuple[int, bool]] = {
            region.inputs[i]: (i, False) for i in region.positions
        }

    def __call__(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        out = super().__call__(node, args, kwargs)
        read = [a for a in node.all_input_nodes if a in self._weights]
        if not read:
            return out
        name = str(node.args[1]) if node.target is getattr else name_of(node.target)
        if name in FLIPS or name in _SAME:
            position, turned = self._weights[read[0]]
            turn = name in FLIPS and flipped(args[0], out)
            self._weights[node] = (position, turned != turn)
            return out
        at = _PRODUCTS.get(node.target)
        if at is None or kwargs or len(read) > 1 or node.args[at] is not read[0]:
            raise RoleError(
                "a weight with a low-rank adapter is read by something else than a matrix product",
                op=str(name), module=module_path(node), source=source_line(node),
                advice="give this weight no adapter",
            )  # fmt: skip
        position, turned = self._weights[read[0]]
        transposed = turned != (node.target is F.linear)
        up, down = self.adapters[position]
        return out + term(args[at - 1], up, down, self._scales[position], transposed).to(out.dtype)


def term(x: Tensor, up: Tensor, down: Tensor, scale: float, transposed: bool) -> Tensor:
    """``s x (up down)``, or ``s x (up down)^T``, through the ``r`` columns between them."""
    up, down = up.to(x.dtype), down.to(x.dtype)
    first, second = (down, up) if transposed else (up.t(), down.t())
    return F.linear(F.linear(x, first) * scale, second)


def flipped(before: Tensor, after: Tensor) -> bool:
    """Whether a view of a matrix has its axes the other way round."""
    return (before.shape, before.stride()) != (after.shape, after.stride())


__all__ = ["FLIPS", "AdaptedRegion", "LowRank", "flipped", "term"]
