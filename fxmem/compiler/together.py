"""What one call of a captured function does with the other ranks of its sequence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxmem._compat import graph as _compat
from fxmem.distributed.sequence import Call, Group, Whole, content, digest, random_state
from fxmem.frontend import parameter_free as pre_
from fxmem.frontend.capture import Capture
from fxmem.plan.plan import Plan
from fxmem.runtime.ranks import Placed
from fxmem.runtime.region_call import RegionCall
from fxmem.runtime.region_code import RegionCode


class Together:
    """``spread``: values between regions of which each rank has its rows, and their dimension."""

    def __init__(
        self, group: Group, plan: Plan, capture: Capture, pre: pre_.Preamble,
        calls: Sequence[RegionCall], spread: Mapping[pre_.Leaf, int],
    ) -> None:  # fmt: skip
        self.group, self.spread = group, spread
        self._plan = digest(plan.to_json())
        codes = dict.fromkeys(c.code for c in calls)
        self._model = digest([_described(c.code) for c in calls])
        self._random = any(c.joint.random for c in codes) or any(
            _compat.is_random(n.target) for n in pre.module.graph.nodes
        )
        leaves = [("input", n.name) for n in capture.inputs]
        learned = [n in capture.parameters for n in capture.inputs]  # a set, with no order
        self._parameters = list(itertools.compress(leaves, learned))
        self._inputs = [x for x, known in zip(leaves, learned, strict=True) if not known]

    def call(self, sizes: Mapping[str, int]) -> Call:
        """For a call of these sizes."""
        return self.group.call(sizes.get("T", 1))

    def of_a_rank(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """What a rank has at most, by which all ranks decide alike."""
        return {**sizes, "T": math.ceil(sizes.get("T", 1) / self.group.count)}

    def agree(
        self, sizes: Mapping[str, int], env: Mapping[pre_.Leaf, Any], levels: Sequence[int]
    ) -> bool:
        """The ranks are about to run the same on the same input, and keep the same for their
        backward: what fits may be measured, and so differ. False: nothing is to be kept.

        Raises:
            DivergedError: they are not; says in what they differ.
        """
        given = [env[leaf] for leaf in self._inputs if type(env[leaf]) is Tensor]
        learns = [env[leaf].requires_grad for leaf in self._parameters]
        device = given[0].device if given else torch.device("cpu")
        return self.group.agree({
            "plans": self._plan, "models": self._model,
            "sizes of inputs": digest(sorted(sizes.items()), [tuple(x.shape) for x in given]),
            "parameters that learn": digest(learns),
            "contents of inputs": content(given),
            "states of random generators": random_state(device) if self._random else 0,
        }, digest(levels))  # fmt: skip

    def whole(
        self, leaves: Sequence[pre_.Leaf], env: Mapping[pre_.Leaf, Any], call: Call
    ) -> dict[pre_.Leaf, Tensor]:
        """Of those of which ranks have rows, the whole, for what runs on all ranks alike."""
        dims = {leaf: self.spread[leaf] for leaf in leaves if leaf in self.spread and leaf in env}
        return {leaf: Whole.apply(call, env[leaf], Placed(d)) for leaf, d in dims.items()}


def _described(code: RegionCode) -> list[str]:
    """What the region computes, in words that all processes share."""
    return [f"{n.target} {code.joint.info.get(n)}" for n in code.joint.graph.nodes]
