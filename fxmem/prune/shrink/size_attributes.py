"""Integer attributes of modules that repeat a size, such as OPT's ``num_heads``.

A sub-model whose parameters shrink needs them changed, and nothing in a module says which they are.
They are found once per model by trial: the smallest set whose change makes a probe sub-model equal
the masked model on two lengths. Later sub-models only look the set up.
"""

from __future__ import annotations

import contextlib
import copy
import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import torch
from torch import Tensor, nn

from fxmem._compat.graph import call_impl
from fxmem.errors import CaptureError, MaskError
from fxmem.frontend.experts import CHECKED, streamable
from fxmem.prune.coupling.calls import Inputs, has_example, results, same_inputs, trials
from fxmem.prune.coupling.find_groups import coupling as trace
from fxmem.prune.coupling.match_norms import rescale, set_epsilons
from fxmem.prune.shrink.made import reduced
from fxmem.prune.shrink.masked import masked
from fxmem.prune.shrink.slicing import buffer_slices, shell, slices
from fxmem.prune.units.masks import BLOCKS, Masks, fingerprint
from fxmem.prune.units.units import Coupling, UnitGroup


@dataclass(frozen=True)
class SizeAttribute:
    """``module.attribute`` (of its config where ``in_config``) is ``factor`` x units of a group."""

    module: str
    attribute: str
    in_config: bool
    group: str
    factor: int


Attributes = tuple[SizeAttribute, ...]
_NONZERO: weakref.WeakKeyDictionary[nn.Module, frozenset[str]] = weakref.WeakKeyDictionary()
"""Model -> unit kinds of which a layer must keep at least one."""
_FOUND: weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, str, str], Attributes]] = (
    weakref.WeakKeyDictionary()
)
searches = 0
"""Trial searches run in this process; a test counts them."""


def remember(
    model: nn.Module, coupling: Coupling, found: Attributes, source: nn.Module | None = None
) -> None:
    """Give ``model`` the attributes found on ``source``."""
    if source is not None and source in _NONZERO:
        _NONZERO[model] = _NONZERO[source]
    kinds = {g.name: g.kind for g in coupling.groups}
    for kind in dict.fromkeys(kinds.values()):
        of_kind = tuple(e for e in found if kinds[e.group] == kind)
        if of_kind or kind != "width":  # none of the width may mean that it was not looked for
            _FOUND.setdefault(model, {})[*_key(model, coupling), kind] = of_kind


def _key(model: nn.Module, coupling: Coupling) -> tuple[str, str]:
    config = getattr(model, "config", None)
    groups = f"{fingerprint(coupling)} {len(coupling.groups)}"
    return groups, str(getattr(config, "_attn_implementation", ""))


def attributes(model: nn.Module, coupling: Coupling, masks: Masks | None = None) -> Attributes:
    """The size attributes of ``model``, found on the first call; the width's if ``masks`` cut it.

    Raises:
        MaskError: no choice of attributes makes a smaller model equal the masked one.
    """
    table = _FOUND.setdefault(model, {})
    base = _key(model, coupling)
    found: Attributes = ()
    for kind in dict.fromkeys(g.kind for g in coupling.groups):
        wanted = kind != "width" or (masks is not None and cuts_width(coupling, masks))
        if wanted and (*base, kind) not in table:
            table[*base, kind] = _search(model, coupling, kind)
        found += table.get((*base, kind), ())
    return found


def cuts_width(coupling: Coupling, masks: Masks) -> bool:
    """Whether ``masks`` remove channels of the residual stream."""
    counts = masks.counts
    widths = (counts.get(g.name) for g in coupling.groups if g.kind == "width")
    return any(c is not None and c[0] < c[1] for c in widths)


def assign(module: nn.Module, entry: SizeAttribute, value: int) -> None:
    """Set one attribute; a config that other modules share is copied for this module first."""
    if not entry.in_config:
        setattr(module, entry.attribute, value)
        return
    own = copy.copy(module.config)
    own.__dict__[entry.attribute] = value
    module.__dict__["config"] = own


def apply(small: nn.Module, found: Attributes, masks: Masks) -> None:
    """Set every attribute of ``found`` to what ``masks`` leave."""
    for entry in found:
        units = len(masks.kept(entry.group))
        assign(small.get_submodule(entry.module), entry, units * entry.factor)


def _candidates(model: nn.Module, small: nn.Module, group: UnitGroup) -> Iterator[SizeAttribute]:
    """Of ``group``, those that the cut module ``small`` has not taken over from its weights."""
    paths = [n.split(".")[:-1] for n, _, _ in group.members]
    shared = 0
    while all(len(p) > shared and p[shared] == paths[0][shared] for p in paths):
        shared += 1
    for path in sorted({".".join(p[:k]) for p in paths for k in range(shared, len(p) + 1)}):
        module = model.get_submodule(path)
        config = getattr(module, "config", None)
        tables = [
            (False, vars(module)),
            (True, vars(config) if hasattr(config, "__dict__") else {}),
        ]
        for in_config, table in tables:
            for key, value in table.items():
                if type(value) is not int or key == "layer_idx" or value % group.size or not value:
                    continue
                if not in_config and vars(small.get_submodule(path))[key] != value:
                    continue
                if value // group.size in group.sizes:
                    yield SizeAttribute(path, key, in_config, group.name, value // group.size)


def _search(model: nn.Module, coupling: Coupling, kind: str) -> Attributes:
    """One set for all layers: attributes are chosen together by path without layer numbers."""
    global searches
    searches += 1
    masks = _probe(coupling, kind)
    small = _cut(model, coupling, masks)
    rescale(dict(small.named_parameters()), coupling, masks)
    set_epsilons(small, coupling, masks)
    choices: dict[tuple[bool, str, str], list[SizeAttribute]] = {}
    for group in coupling.groups:
        for entry in _candidates(model, small, group) if group.kind == kind else ():
            role = re.sub(r"\d+", "*", entry.module)
            choices.setdefault((entry.in_config, role, entry.attribute), []).append(entry)
    keys = sorted(choices)
    inputs = trials(model)
    before = {id(m): (m, dict(vars(m))) for m in small.modules()}
    with torch.no_grad(), evaluating(model), evaluating(small):
        with masked(model, masks, coupling), streamable(model):
            wanted = [results(model, x, call_impl(model)) for x in inputs]
        with streamable(model):
            dense = [results(model, x, call_impl(model)) for x in inputs]
        seen = not all(map(partial(_alike, kind=kind, loose=30.0), dense, wanted))
        for count in range(min(len(keys), 4) + 1):
            for chosen in combinations(keys, count):
                found = tuple(e for k in chosen for e in choices[k])
                apply(small, found, masks)
                good = _runs(small, inputs, wanted, kind)
                if good and (has_example(model) or not seen):
                    good = alike(small, model, reduced(coupling, masks))
                for m, table in before.values():
                    vars(m).update(table)
                if good:
                    if kind in BLOCKS:
                        _try_empty(model, coupling, kind, found, inputs)
                    return found
    raise MaskError(
        f"no choice of size attributes makes this model with fewer {kind} run exactly",
        module=type(model).__name__,
        advice="sizes that a forward writes as numbers do not follow its weights: read them from "
        "shapes or from attributes of the module",
    )


def _probe(coupling: Coupling, kind: str) -> Masks:
    """Every second unit of ``kind``, and the last ones, as far as a group needs more."""
    kept = {}
    for g in coupling.groups:
        if g.kind == kind:
            units = set(range(0, g.size, 2))
            spare = [i for i in range(g.size) if i not in units]
            kept[g.name] = tuple(sorted(units | set(spare[: max(0, g.least - len(units))])))
    return Masks.from_kept(coupling, kept)


def _cut(model: nn.Module, coupling: Coupling, masks: Masks) -> nn.Module:
    return shell(model, slices(coupling, masks), buffer_slices(coupling, masks))


def _runs(small: nn.Module, inputs: list[Inputs], wanted: list[list[Tensor]], kind: str) -> bool:
    """Whether ``small`` gives what is wanted; with fewer experts in its own way too."""
    if kind != "experts":
        with streamable(small):
            return agrees(small, inputs, wanted, kind)
    with streamable(small, CHECKED):
        good = agrees(small, inputs, wanted, kind)
    return good and agrees(small, inputs, wanted, kind)


def alike(small: nn.Module, model: nn.Module, plan: Coupling) -> bool:
    """Whether the forward of ``small`` cuts its weights into the units of ``plan``.

    It says what values cannot: where units hardly change the output, or where a wrong count of
    heads happens to fit the one shape that is tried.
    """
    same_inputs(small, model)
    try:
        found = trace(small)
    except CaptureError:
        return False
    ours = {frozenset(g.members): g.size for g in found.groups}
    return all(ours.get(frozenset(g.members)) == g.size for g in plan.groups if g.size > 1)


def _try_empty(
    model: nn.Module, coupling: Coupling, kind: str, found: Attributes, inputs: list[Inputs]
) -> None:
    """Note in ``_NONZERO`` whether layers with no unit of ``kind`` run exactly."""
    masks = Masks.from_kept(coupling, {g.name: () for g in coupling.groups if g.kind == kind})
    with masked(model, masks, coupling), streamable(model):
        wanted = [results(model, x, call_impl(model)) for x in inputs]
    small = _cut(model, coupling, masks)
    apply(small, found, masks)
    with evaluating(small), streamable(small):
        if not agrees(small, inputs, wanted, kind):
            _NONZERO[model] = _NONZERO.get(model, frozenset()) | {kind}


def nonzero(model: nn.Module) -> frozenset[str]:
    """Kinds of which every layer of ``model`` needs a unit to run; known after `attributes`."""
    return _NONZERO.get(model, frozenset())


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the context; every module's own mode afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for m, was in modes:
            m.training = was


def agrees(small: nn.Module, inputs: list[Inputs], wanted: list[list[Tensor]], kind: str) -> bool:
    """Whether ``small`` gives what is wanted of some inputs, but for rounding."""
    for x, wants in zip(inputs, wanted, strict=True):
        try:
            given = results(small, x)
        except Exception:  # sizes that do not fit may fail in the model's own code in any way
            return False
        if not _alike(given, wants, kind):
            return False
    return True


def _alike(given: list[Tensor], wants: list[Tensor], kind: str, loose: float = 1.0) -> bool:
    """``loose``: how many times the limit is allowed."""
    return len(given) == len(wants) and all(
        got.shape == want.shape and _near(got, want, kind, loose)
        for got, want in zip(given, wants, strict=True)
    )


def _near(got: Tensor, want: Tensor, kind: str, loose: float) -> bool:
    if not want.numel():
        return True
    scale = want.abs().max().clamp_min(1e-30)
    step = torch.finfo(want.dtype).eps
    if kind in ("experts", "width"):  # norms and routers compute in float32 whatever the type
        step = max(step, torch.finfo(torch.float32).eps)
    return bool((got - want).abs().max() / scale <= loose * step**0.75 * 10)
