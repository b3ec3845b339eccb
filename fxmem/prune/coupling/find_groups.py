"""Find the unit groups of a model from its captured forward."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from dataclasses import replace
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor, nn

from fxmem.errors import CaptureError
from fxmem.frontend.experts import streamable
from fxmem.prune.coupling.calls import logits
from fxmem.prune.coupling.channel_labels import Atom, fix, fresh, leaves, path, resolve, root, width
from fxmem.prune.coupling.label_channels import Walk
from fxmem.prune.coupling.residual_stream import streams
from fxmem.prune.coupling.routers import choices
from fxmem.prune.units.units import Coupling, Member, Norm, UnitGroup, cost_of


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Any:
        return logits(self.model, input_ids)


def coupling(model: nn.Module, example: Tensor | None = None) -> Coupling:
    """Unit groups of a model that reads token ids; ``example``: ids ``[batch, length]``.

    Raises:
        CaptureError: where the forward cannot be exported, or the model reads no token ids.
    """
    if not any(isinstance(m, nn.Embedding) for m in model.modules()):
        raise CaptureError(
            f"{type(model).__name__} has no embedding of tokens",
            advice="models that read token ids and return logits can be pruned",
        )
    device = next(model.parameters()).device
    ids = torch.zeros(3, 11, dtype=torch.long, device=device) if example is None else example
    was = model.training
    try:
        with streamable(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.eval()
            program = torch.export.export(_Logits(model), (ids,), strict=False)
            try:
                program = program.run_decompositions()
            except (RuntimeError, ValueError):
                # a decomposition may give other strides than the op, and a later view then fails
                program = program.run_decompositions({})
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be exported", reason=str(error).split("\n")[0]
        ) from error
    finally:
        model.train(was)
    return _groups(model, program)


def _groups(model: nn.Module, program: Any) -> Coupling:
    canonical = {id(p): n for n, p in model.named_parameters()}
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    labels = {n: [fresh(k) for k in shape] for n, shape in shapes.items()}
    every = dict(model.named_parameters(remove_duplicate=False))
    names = program.graph_signature.inputs_to_parameters
    buffers = program.graph_signature.inputs_to_buffers
    walk = Walk(model, choices(program.graph))
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name in names:
                name = canonical[id(every[names[node.name].removeprefix("model.")])]
                walk.parameter(node, name, labels[name])
            else:
                buffer = buffers.get(node.name, "").removeprefix("model.")
                walk.source(node, f"the buffer {buffer}" if buffer else "an input of the model")
        elif node.op == "call_function":
            walk.call(node)
        elif node.op == "output":
            for out in node.args[0]:
                for axis in walk.axes.get(out) or []:
                    _fix_output(axis)
        else:
            walk.source(node, f"{node.op} {node.name}")
    walk.mark_heads()
    for axis, _ in walk.chosen:
        if [len(s) for s in resolve(axis)] != [1]:
            fix(axis, "experts in parts")
    widths = streams(walk.averaged, walk.looked_up, walk, program.graph)
    uses = Counter(name for name in walk.products)
    return replace(
        _collect(walk, labels, shapes, widths),
        item_sizes=tuple((n, p.element_size()) for n, p in model.named_parameters()),
        products=tuple(uses.items()),
    )


def _fix_output(axis: Any) -> None:
    for atom in leaves(axis):
        atom.fixed = atom.fixed or "an output of the model (vocabulary)"


def _collect(
    walk: Walk, labels: dict[str, list[Any]], shapes: dict[str, Any],
    widths: dict[Atom, tuple[Norm, ...]],
) -> Coupling:  # fmt: skip
    contracted = {(n, root(a)) for n, a in walk.contracted}
    consumers = {(n, leaf) for n, a in contracted for leaf in leaves(((a,),))}
    found: dict[Atom, list[Member]] = {}
    blocked: list[tuple[str, int, str]] = []
    factors: dict[Atom, set[int]] = {}
    for name, axes in labels.items():
        for i, axis in enumerate(axes):
            why = None
            for segment in resolve(axis):
                for j, atom in enumerate(segment):
                    if atom.ref is not None or atom.fixed:
                        why = why or atom.fixed or "cut into parts below a product"
                        continue
                    found.setdefault(atom, [])
                    for p in path(axis, atom):
                        if (name, i, p) not in found[atom]:
                            found[atom].append((name, i, p))
                    sizes = factors.setdefault(atom, {1})
                    for k in range(j, len(segment)):
                        sizes.add(width(segment[j : k + 1]) // atom.size)
                    sizes.add(shapes[name][i] // atom.size)
            if why:
                blocked.append((name, i, why))
    names = _Names()
    experts = _Experts(walk)
    groups: list[UnitGroup] = []
    for atom, members in found.items():
        kind = "kv_groups" if atom.attention else "mlp_channels"
        kind = "width" if atom in widths else kind
        inner = any(step == "inner" for _, _, p in members for step, _, _ in p)
        consumer = tuple(m for m in members if (m[0], atom) in consumers)
        if atom in experts.chosen:
            kind, consumer = "experts", experts.consumer(members)
        if inner or not consumer or atom.size < 2 or len(consumer) == len(members):
            why = "position inside a head" if inner else "no consumer contracts it"
            blocked += [(n, i, why) for n, i, _ in members]
            continue
        name, layer = names(members, kind)
        group = UnitGroup(
            name, kind, layer, atom.size, cost_of(tuple(members), shapes, atom.size),
            tuple(members), consumer, tuple(sorted(factors[atom])), widths.get(atom, ()),
        )  # fmt: skip
        groups.append(experts.complete(group, atom) if kind == "experts" else group)
    groups.sort(key=lambda g: g.kind == "width")
    return Coupling(tuple(groups), tuple(dict.fromkeys(blocked)), tuple(shapes.items()))


class _Names:
    """Names of groups: the path that the members share, and the kind."""

    def __init__(self) -> None:
        self.taken: set[str] = set()

    def __call__(self, members: list[Member], kind: str) -> tuple[str, int]:
        """Name and layer number (-1 where there is none)."""
        shared = commonprefix([n.split(".") for n, _, _ in members])
        base = ".".join([*([] if kind == "width" else shared), kind])
        name, k = base, 1
        while name in self.taken:
            k += 1
            name = f"{base}.{k}"
        self.taken.add(name)
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", ".".join(shared))
        return name, int(number[1]) if number else -1


class _Experts:
    """What the walk found of axes of experts."""

    def __init__(self, walk: Walk) -> None:
        self.chosen: dict[Atom, int] = {}
        self.router: dict[Atom, set[str]] = {}
        self.outputs: set[str] = set()
        for axis, choice in walk.chosen:
            (atom,) = leaves(axis)[:1]
            self.chosen[atom] = max(choice.chosen, self.chosen.get(atom, 0))
            assert choice.weight is not None
            self.router.setdefault(atom, set()).add(walk.origin[choice.weight])
            self.outputs |= {walk.origin[choice.consumers[n]] for n in choice.outputs}

    def consumer(self, members: list[Member]) -> tuple[Member, ...]:
        return tuple(m for m in members if m[0] in self.outputs)

    def complete(self, group: UnitGroup, atom: Atom) -> UnitGroup:
        router = tuple(m for m in group.members if m[0] in self.router[atom])
        return replace(group, least=self.chosen[atom], router=router)
