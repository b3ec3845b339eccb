"""Find the unit groups of a model from its captured forward."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxmem._compat.tracing import decompositions
from fxmem.distributed.whole import check_whole
from fxmem.errors import CaptureError
from fxmem.frontend.experts import streamable
from fxmem.prune.coupling.calls import Inputs, inputs, results
from fxmem.prune.coupling.channel_labels import Atom, fix, fresh, leaves, path, resolve, root, width
from fxmem.prune.coupling.label_channels import Walk
from fxmem.prune.coupling.residual_stream import streams
from fxmem.prune.coupling.routers import choices
from fxmem.prune.units.units import Coupling, Member, Norm, UnitGroup, cost_of
from fxmem.rules import WRITTEN_OUT


class _Called(nn.Module):
    """The model as a function of the tensors of one call."""

    def __init__(self, model: nn.Module, given: Inputs) -> None:
        super().__init__()
        self.model = model
        self.given = given

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(results(self.model, self.given.with_tensors(tensors)))


def coupling(
    model: nn.Module, example: Any = None, kwargs: Mapping[str, Any] | None = None
) -> Coupling:
    """Unit groups of a model; see `fxmem.prune.shrink.materialize.coupling`.

    Raises:
        CaptureError: where the forward cannot be exported, or what it reads is not known.
        PlanError: the model is wrapped or sharded.
    """
    check_whole(model)
    given = inputs(model, example, kwargs)
    was = [(m, m.training) for m in model.modules()]
    try:
        with streamable(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.eval()
            program = torch.export.export(_Called(model, given), tuple(given.tensors), strict=False)
            try:
                program = program.run_decompositions(decompositions(WRITTEN_OUT))
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
        for module, mode in was:
            module.training = mode
    return _groups(model, program)


@dataclass
class _Leaves:
    """What is cut: axes and shapes of parameters and buffers by name."""

    parameters: dict[str, list[Any]]
    buffers: dict[str, list[Any]]
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, model: nn.Module) -> _Leaves:
        """Of buffers those that are saved: the others are made by the model's own code."""
        saved = model.state_dict(keep_vars=True).keys()
        tables: list[dict[str, Tensor]] = [
            dict(model.named_parameters()),
            {n: b for n, b in model.named_buffers() if n in saved and b.is_floating_point()},
        ]
        shapes = {n: tuple(t.shape) for table in tables for n, t in table.items()}
        axes = [{n: [fresh(k) for k in shapes[n]] for n in table} for table in tables]
        return cls(axes[0], axes[1], shapes)


def _groups(model: nn.Module, program: Any) -> Coupling:
    found = _Leaves.of(model)
    walk = _walked(model, program, found)
    walk.mark_heads()
    for axis, _ in walk.chosen:
        if [len(s) for s in resolve(axis)] != [1]:
            fix(axis, "experts in parts")
    for axes in (*found.parameters.values(), *found.buffers.values()):
        for segment in (s for axis in axes for s in resolve(axis)):
            for atom in segment:
                if atom.ref is not None:
                    fix(((atom,),), "cut into parts below a product")
    widths = streams(walk.averaged, walk.looked_up, walk, program.graph)
    return replace(
        _collect(walk, found, widths),
        item_sizes=tuple((n, p.element_size()) for n, p in model.named_parameters()),
        products=tuple(walk.products.items()),
    )


def _walked(model: nn.Module, program: Any, found: _Leaves) -> Walk:
    signature = program.graph_signature
    parameters = _canonical(signature.inputs_to_parameters, model.named_parameters)
    buffers = _canonical(signature.inputs_to_buffers, model.named_buffers)
    lifted = signature.inputs_to_lifted_tensor_constants
    constants = {
        n: program.constants[lifted[n.name]]
        for n in program.graph.nodes
        if n.op == "placeholder" and n.name in lifted
    }
    walk = Walk(model, choices(program.graph), constants)
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in parameters:
            name = parameters[node.name]
            walk.leaf(node, found.parameters[name], name)
        elif node.op == "placeholder" and buffers.get(node.name) in found.buffers:
            walk.leaf(node, found.buffers[buffers[node.name]])
        elif node.op == "placeholder":
            kind = "a constant tensor" if node in constants else "an input of the model"
            buffer = buffers.get(node.name)
            walk.source(node, f"the buffer {buffer}" if buffer else kind)
        elif node.op == "call_function":
            walk.call(node)
        elif node.op == "output":
            _fix_outputs(node, walk)
        else:
            walk.source(node, f"{node.op} {node.name}")
    return walk


def _canonical(names: Mapping[str, str], named: Any) -> dict[str, str]:
    """Placeholder -> the first name in the model of the tensor that it stands for."""
    first = {id(t): n for n, t in named()}
    every = dict(named(remove_duplicate=False))
    return {k: first[id(every[n.removeprefix("model.")])] for k, n in names.items()}


def _fix_outputs(node: fx.Node, walk: Walk) -> None:
    for out in node.args[0]:
        axes = walk.axes.get(out)
        for atom in (a for axis in axes or [] for a in leaves(axis)):
            atom.fixed = atom.fixed or "an output of the model (vocabulary)"


@dataclass
class _Held:
    """Where free atoms are: members by atom, of parameters and of buffers, and factors of sizes."""

    members: dict[Atom, list[Member]]
    buffers: dict[Atom, list[Member]]
    factors: dict[Atom, set[int]]
    blocked: list[tuple[str, int, str]]

    @classmethod
    def of(cls, found: _Leaves) -> _Held:
        held = cls({}, {}, {}, [])
        for name, axes in found.parameters.items():
            for i, axis in enumerate(axes):
                if why := held.add(held.members, name, i, axis, found.shapes[name][i]):
                    held.blocked.append((name, i, why))
        for name, axes in found.buffers.items():
            for i, axis in enumerate(axes):
                held.add(held.buffers, name, i, axis, found.shapes[name][i])
        return held

    def add(
        self, table: dict[Atom, list[Member]], name: str, i: int, axis: Any, size: int
    ) -> str | None:
        """Note the atoms of one axis; why some of it cannot be cut."""
        why = None
        for segment in resolve(axis):
            for j, atom in enumerate(segment):
                if atom.ref is not None or atom.fixed:
                    why = why or atom.fixed
                    continue
                places = table.setdefault(atom, [])
                places += [(name, i, p) for p in path(axis, atom) if (name, i, p) not in places]
                sizes = self.factors.setdefault(atom, {1})
                for k in range(j, len(segment)):
                    sizes.add(width(segment[j : k + 1]) // atom.size)
                sizes.add(size // atom.size)
        return why


def _collect(walk: Walk, found: _Leaves, widths: dict[Atom, tuple[Norm, ...]]) -> Coupling:
    contracted = {(n, root(a)) for n, a in walk.contracted}
    consumers = {(n, leaf) for n, a in contracted for leaf in leaves(((a,),))}
    shapes = {n: found.shapes[n] for n in found.parameters}
    held = _Held.of(found)
    names = _Names()
    experts = _Experts(walk)
    groups: list[UnitGroup] = []
    for atom, members in held.members.items():
        kind = _kind(walk, atom, members, widths)
        inner = any(step == "inner" for _, _, p in members for step, _, _ in p)
        consumer = tuple(m for m in members if (m[0], atom) in consumers)
        if atom in experts.chosen:
            kind, consumer = "experts", experts.consumer(members)
        if inner or not consumer or atom.size < 2 or len(consumer) == len(members):
            why = "position inside a head" if inner else "no consumer contracts it"
            held.blocked += [(n, i, why) for n, i, _ in members]
            continue
        name, layer = names(members, kind)
        group = UnitGroup(
            name, kind, layer, atom.size, cost_of(tuple(members), shapes, atom.size),
            tuple(members), consumer, tuple(sorted(held.factors[atom])), widths.get(atom, ()),
            least=int(kind == "channels"), buffers=tuple(held.buffers.get(atom, ())),
            unowned=tuple(sorted({n for n, _, _ in consumer} & walk.unowned)),
        )  # fmt: skip
        groups.append(experts.complete(group, atom) if kind == "experts" else group)
    groups.sort(key=lambda g: g.kind == "width")
    return Coupling(
        tuple(groups), tuple(dict.fromkeys(held.blocked)), tuple(shapes.items()),
        buffers=tuple((n, found.shapes[n]) for n in found.buffers),
    )  # fmt: skip


def _kind(
    walk: Walk, atom: Atom, members: list[Member], widths: dict[Atom, tuple[Norm, ...]]
) -> str:
    if atom in widths:
        return "width"
    if atom.attention:
        return "kv_groups"
    return "channels" if any(n in walk.windows for n, _, _ in members) else "mlp_channels"


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
