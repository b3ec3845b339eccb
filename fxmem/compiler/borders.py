"""What runs between the regions of a capture: hooks on gradients, under plain autograd.

See :mod:`fxmem.passes.hook_borders`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxmem.axes.sizes import degree
from fxmem.errors import HookError, RoleError
from fxmem.frontend.capture import Capture, call_node, is_tensor
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
            RoleError: there are hooks, and the parameters have roles.
        """
        for node in (n for nodes in self.nodes for n in nodes):
            where = {"module": module_path(node), "source": source_line(node)}
            if roles:
                raise RoleError(
                    "a hook on a gradient inside a model that is trained block by block",
                    advice="remove the hook, or train without Blocks", **where,
                )  # fmt: skip
            if is_tensor(node) and degree(self.capture.shape(node)) > 1:
                raise HookError(
                    "a hook on the gradient of a value of T x T elements, which streaming never "
                    "makes as a whole", **where,
                )  # fmt: skip

    def leaves(self, at: int) -> list[Leaf]:
        """What is read and made before a region."""
        nodes = self.nodes[at]
        return [leaf_of(self.pre, n) for node in nodes for n in (*node.all_input_nodes, node)]

    def cross(self, at: int, env: dict[Leaf, Any]) -> None:
        """Run what lies before a region."""
        for node in self.nodes[at]:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[leaf_of(self.pre, n)])
            with self.capture.contexts[node].enter():
                env["main", node.name] = call_node(node, args, kwargs)
