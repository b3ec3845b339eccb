"""Parameters that several regions use: which region returns the whole gradient."""

from __future__ import annotations

from fxmem.frontend import parameter_free as pre_
from fxmem.runtime.region_call import RegionCall


def _link_shared(calls: list[RegionCall]) -> None:
    """Parameters of several regions (tied weights): one of them returns the whole gradient.

    The first region that uses the parameter is the last to run in a backward; the others hand
    their part on, see :mod:`fxmem.runtime.shared_grads`.
    """
    users: dict[pre_.Leaf, list[int]] = {}
    for i, call in enumerate(calls):
        for leaf, grad in zip(call.leaves, call.code.joint.grads, strict=True):
            if leaf[0] == "input" and grad is not None:
                users.setdefault(leaf, []).append(i)
    for leaf, where in users.items():
        if len(where) > 1 and len(set(where)) == len(where):
            for i in where:
                at = calls[i].leaves.index(leaf)
                calls[i].shared[at] = (leaf, i == where[0])
