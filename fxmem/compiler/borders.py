"""What runs between the regions of a capture, under plain autograd: hooks on gradients, pieces of
the model that run as they are, and writes to what the model holds.

See :mod:`fxmem.passes.hook_borders`, :mod:`fxmem.frontend.opaque` and
:mod:`fxmem.frontend.functional_writes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxmem._compat import capture_stack
from fxmem._compat import hooks as _compat_hooks
from fxmem.axes.sizes import degree, evaluate
from fxmem.errors import HookError, RoleError
from fxmem.frontend.capture import (
    Capture,
    behind,
    canonical,
    is_number,
    is_size,
    is_tensor,
    value_of,
)
from fxmem.frontend.functional_writes import is_of_held
from fxmem.frontend.interpret import call_node
from fxmem.frontend.origin import module_path, source_line
from fxmem.frontend.parameter_free import Leaf, Preamble, leaf_of


@dataclass(slots=True)
class Borders:
    """``nodes``: those before each region, then those after the last one."""

    capture: Capture
    pre: Preamble
    nodes: Sequence[Sequence[fx.Node]]

    def check(self, roles: bool) -> None:
        """
        Raises:
            HookError: a hook watches a value with a row for every pair of tokens.
            RoleError: there are hooks or pieces, and the parameters have roles.
        """
        for node in (n for nodes in self.nodes for n in nodes if not is_of_held(n)):
            where = {"module": module_path(node), "source": source_line(node)}
            if roles and capture_stack.is_piece(node):
                raise RoleError(
                    "a part that runs as it is, inside a model that is trained block by block",
                    advice="train without Blocks", **where,
                )  # fmt: skip
            if roles:
                raise RoleError(
                    "a hook on a gradient inside a model that is trained block by block",
                    advice="remove the hook, or train without Blocks", **where,
                )  # fmt: skip
            hook = _compat_hooks.is_hook(node) and is_tensor(node)
            if hook and degree(self.capture.shape(node)) > 1:
                raise HookError(
                    "a hook on the gradient of a value of T x T elements, which streaming never "
                    "makes as a whole", **where,
                )  # fmt: skip

    def leaves(self, at: int) -> list[Leaf]:
        """What is read and made before a region."""
        found: list[Leaf] = []
        for node in self.nodes[at]:
            for n in (*(b for a in node.all_input_nodes for b in behind(a)), node):
                cone = self.pre.cones.get(n)
                found += [leaf_of(self.pre, n)] if cone is None else cone.leaves
        return found

    def cross(self, at: int, env: dict[Leaf, Any], sizes: Mapping[str, int]) -> None:
        """Run what lies before a region."""
        for node in self.nodes[at]:
            env["main", node.name] = self._call(node, env, sizes)

    def _call(self, node: fx.Node, env: dict[Leaf, Any], sizes: Mapping[str, int]) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._value(n, env, sizes))
        with self.capture.contexts[node].enter():
            return call_node(node, args, kwargs)

    def _value(self, node: fx.Node, env: dict[Leaf, Any], sizes: Mapping[str, int]) -> Any:
        if is_number(node):
            return self._call(node, env, sizes)
        if is_size(value_of(node)) and not isinstance(value_of(node), (tuple, list)):
            return evaluate(canonical(value_of(node), self.capture.symbols), sizes)
        cone = self.pre.cones.get(node)
        if cone is None:
            held = ("held", node.name)
            return env[held if held in env else leaf_of(self.pre, node)]
        ints = [env["input", n.name] for n in cone.ints]
        return cone(*ints, *(env[leaf] for leaf in cone.leaves))
