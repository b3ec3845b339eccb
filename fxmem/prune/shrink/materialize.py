"""Really smaller models, equal to the masked ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fxmem.distributed.whole import check_whole
from fxmem.frontend.experts import settle
from fxmem.prune.coupling.calls import same_inputs
from fxmem.prune.coupling.find_groups import coupling as trace
from fxmem.prune.coupling.match_norms import rescale, set_epsilons
from fxmem.prune.shrink.empty_layers import padded, silence
from fxmem.prune.shrink.made import origin, reduced
from fxmem.prune.shrink.repair import repair as mend
from fxmem.prune.shrink.saving import mark
from fxmem.prune.shrink.size_attributes import apply, attributes, remember
from fxmem.prune.shrink.slicing import buffer_slices, shell, slices
from fxmem.prune.units.masks import Masks
from fxmem.prune.units.units import Coupling


def coupling(
    model: nn.Module, example: Any = None, kwargs: Mapping[str, Any] | None = None
) -> Coupling:
    """Unit groups of a model.

    A model that fxmem made smaller keeps the groups of the dense one, those of no or one unit too.

    Args:
        model: any module, in whichever mode; its forward in evaluation mode is what is read.
        example: what it is called with: a tensor, or a tuple of all positional arguments. A model
            that reads token ids needs none. It is kept beside the model for `materialize`.
        kwargs: keyword arguments of the call.

    Raises:
        CaptureError: where the forward cannot be exported, or there is no example and the model
            reads no token ids.
        PlanError: the model is wrapped or sharded.
    """
    made = origin(model)
    return trace(model, example, kwargs) if made is None else reduced(*made)


def materialize(
    model: nn.Module, masks: Masks, coupling: Coupling | None = None, *,
    repair: Sequence[Mapping[str, Any]] | None = None,
) -> nn.Module:  # fmt: skip
    """A smaller model with its own contiguous storage; ``model`` is untouched.

    Peak memory is the dense model, the smaller one and one parameter. Attributes that hold a size
    are found by trial once per model; a further sub-model costs its slices only. Where a layer
    cannot run with no unit (GPT-2, OPT), one stays whose output weights are zero. A smaller width
    rescales the norms' weights and eps (`fxmem.prune.coupling.match_norms`).

    Args:
        model: the dense model, or one that fxmem made smaller.
        masks: of `model`.
        coupling: ``fxmem.coupling(model)``, where it is at hand: tracing takes a while.
        repair: batches with labels, of one shape: weights that lost inputs are solved again by
            least squares (`fxmem.prune.shrink.repair`), never to a higher loss on the last
            quarter of the rows. The result is then no longer the masked model.

    Raises:
        MaskError: masks of another model, or no consistent sizes.
        PlanError: batches that nothing can be repaired from; the model is wrapped or sharded.
    """
    if coupling is None:
        made = origin(model)
        coupling = trace(model) if made is None else reduced(*made)
    small = cut_out(model, masks, coupling)
    if repair is not None:
        _, bare = padded(model, coupling, masks.on(coupling))
        mend(model, small, coupling, masks, bare, repair)
    return small


def cut_out(
    model: nn.Module, masks: Masks, coupling: Coupling, *, share: bool = False
) -> nn.Module:
    """As `materialize`; `share`: parameters that are not cut are those of ``model``, not copies."""
    check_whole(model)
    made = origin(model)
    masks = masks.on(coupling)
    found = attributes(model, coupling, masks)
    masks, bare = padded(model, coupling, masks)
    parts, buffers = slices(coupling, masks), buffer_slices(coupling, masks)
    small = shell(model, parts, buffers, share=share)
    silence(dict(small.named_parameters()), coupling, masks, bare)
    rescale(dict(small.named_parameters()), coupling, masks)
    set_epsilons(small, coupling, masks)
    apply(small, found, masks)
    mark(small, *((coupling, masks) if made is None else (made[0], masks.after(made[1]))))
    remember(small, reduced(coupling, masks), found, model)
    same_inputs(small, model)
    settle(small)
    return small
