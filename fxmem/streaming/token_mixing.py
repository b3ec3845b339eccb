"""Which values of a forward are worth holding until the backward.

A streamed backward makes every value of the forward again. The results of operators that read other
tokens (attention) are the dearest to make, quadratic in the length, and as small as a hidden state.
:mod:`fxmem.runtime.retention` decides which regions hold them.
"""

from __future__ import annotations

from torch import fx

from fxmem.axes.sizes import has_axis
from fxmem.caches import Cache
from fxmem.frontend import capture as cap
from fxmem.frontend import regions
from fxmem.frontend.canonicalize import Canonicalize
from fxmem.frontend.joint import Joint, trace
from fxmem.frontend.saved_regions import file_of, read, write
from fxmem.rules import revision
from fxmem.streaming.carried_states import with_states
from fxmem.streaming.labels import Kind, Label, analyse
from fxmem.streaming.schedule import backward_nodes, producer

_MIXING: Cache[str, tuple[bool, list[object]]] = Cache("mixing of segments", 1024)
"""By key; what the key names by identity lives as long as its entry."""


def mixed(joint: Joint, *, ranks: bool = False) -> list[fx.Node]:
    """Forward values that the backward reads, of operators that need a streamed value whole, and
    the states that are handed from chunk to chunk in the forward, which ``ranks`` have none of.
    """
    labels, late = analyse(joint, causal=True, ranks=ranks), backward_nodes(joint)
    states = {s for op, s in labels.states.items() if op not in late}

    def mixes(node: fx.Node) -> bool:
        operands = [(u.cut, labels.label.get(u.operand)) for u in labels.uses.get(node, ())]
        return any(
            cut is None and isinstance(label, Label) and label.kind is Kind.CUT
            for cut, label in operands
        )

    return [
        node
        for node in joint.graph.nodes
        if node in states
        or node not in late
        and isinstance(label := labels.label.get(node), Label)
        and label.kind is Kind.CUT
        and sum(has_axis(d) for d in joint.info[node].shape) == 1
        and any(user in late for user in node.users)
        and mixes(producer(node))
    ]


def mixes(region: regions.Region) -> bool:
    """The region's forward reads another token's wide value; asked once of equal ones."""
    if any(n.op == "get_attr" for n in region.nodes):
        return _mixes(region)  # its key has the identity of a constant that may die
    key = f"{revision()} {region.capture.assumed} {region.key()}"
    if key not in _MIXING:
        file = None if revision() else file_of(region, "mixes")
        found = None if file is None else read(file)
        if not isinstance(found, bool):
            found = _mixes(region)
            if file is not None:
                write(file, found)
        _MIXING[key] = found, [n.target for n in region.nodes]
    return _MIXING[key][0]


def _mixes(region: regions.Region) -> bool:
    joint = with_states(trace(region, Canonicalize(), backward=False))
    labels = analyse(joint, causal=True)
    if labels.states:
        return True
    for uses in labels.uses.values():
        for use in uses:
            info = joint.info[use.operand]
            streams = use.operand in joint.learned and any(has_axis(d) for d in info.shape)
            if (
                use.cut is None
                and (streams or cap.is_wide(info.shape))
                and info.dtype.is_floating_point
            ):
                return True
            label = labels.label[use.operand]
            if use.cut is not None and getattr(label, "cut", None) not in (None, use.cut):
                return True
    return False
