"""Deferred outputs of one model, and the compiled programs of what is done with them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxmem._compat import graph as _compat
from fxmem._compat.overrides import version
from fxmem._compat.trl import spare_kernels
from fxmem._compat.varying import mark_dynamic
from fxmem.axes.sizes import evaluate
from fxmem.caches import Cache
from fxmem.deferred.source import Source, source
from fxmem.deferred.tape import MODE, Memory, Node, needed
from fxmem.deferred.tensor import Deferred, handle
from fxmem.errors import FxmemError, FxmemWarning, ModifiedParameterError
from fxmem.frontend import origin
from fxmem.frontend.capture import canonical, is_size, value_of
from fxmem.frontend.inputs import uniform
from fxmem.frontend.interpret import attribute
from fxmem.frontend.late_outputs import Late
from fxmem.roles.terms import Terms
from fxmem.runtime.sharding import Sharding, current

KEEP = 'Stream(logits="keep") hands out plain logits'


@dataclass(eq=False)
class Program:
    """What equal recordings share."""

    plain: Callable[..., Any]
    backend: Any
    compiled: Callable[..., Any]
    calls: list[str]

    @property
    def summary(self) -> str:
        """The calls in order, and how they run."""
        return f"{' '.join(self.calls)}: {'streamed' if self.backend.graphs else 'on whole logits'}"


_PROGRAMS: Cache[tuple[str, str], Program] = Cache("recorded losses", 256)
_NUMBERS: Cache[str, tuple[list[Any], set[int]]] = Cache("numbers in recordings", 1024)
"""The numbers of the first recording of a text, and which have had another value since."""


def _settled(made: Source) -> Source:
    """Numbers are constants until they change."""
    first, varying = _NUMBERS.setdefault(made.text, (made.numbers, set()))
    varying |= {i for i, n in enumerate(made.numbers) if n != first[i]}
    return made.fixed(varying)


@dataclass(eq=False)
class Head:
    """One output of one call. ``learns``: of a call with gradients."""

    recorder: Recorder
    learns: bool


@dataclass(eq=False)
class Recorder:
    """``key`` tells plans apart; ``backend(learns)`` makes a Dynamo backend for one program.

    Where its parameters have roles, nothing but that program may make their gradients.
    """

    key: str
    backend: Callable[[bool], Any]
    programs: dict[str, Program] = field(default_factory=dict)
    sharding: Sharding | None = None
    told: set[str] = field(default_factory=set)

    def graphs(self) -> list[Any]:
        """What has been compiled."""
        return [g for p in self.programs.values() for g in p.backend.graphs]

    @property
    def roles(self) -> bool:
        """Some program follows the roles of its parameters."""
        return any(p.backend.roles is not None for p in self.programs.values())

    def output(self, late: Late, values: Sequence[Any], sizes: dict[str, int]) -> Tensor:
        """A tensor that stands for a late output; ``values``: what its region reads."""
        spare_kernels(Deferred)
        self.sharding, learns = current(), torch.is_grad_enabled()
        return handle(_head(late, values, sizes, Head(self, learns)))

    def give(self, wanted: list[Node], alive: Iterable[Node], name: str) -> None:
        """Compute nodes, and with them what else of the same outputs is small and still there."""
        heads = frozenset().union(*(n.heads for n in wanted))
        wide = any(n.wide for n in wanted)
        wanted = sorted(dict.fromkeys(wanted), key=lambda n: n.fake.dim())
        if not wide:
            wanted += [
                n for n in alive
                if n.real is None and not n.wide and n.heads <= heads and n not in wanted
            ]  # fmt: skip
        nodes = needed(wanted)
        learns = any(n.sources for n in nodes)
        _unchanged(nodes)
        made = _settled(source(nodes, wanted))
        for node, real in zip(wanted, self._run(made, wide, name, learns), strict=True):
            node.know(real)

    def apart(self, node: Node, name: str) -> tuple[Tensor, dict[int, Tensor]]:
        """Values of a node, made of copies of what has a gradient and is no parameter; the copies
        by what they are of.
        """
        nodes = needed([node])
        _unchanged(nodes)
        made = _settled(source(nodes, [node]))
        copies = {
            id(x): x.detach().requires_grad_()
            for x in made.inputs if x.requires_grad and not x.is_leaf
        }  # fmt: skip
        (real,) = self._run(made, node.wide, name, True, copies)
        return real, copies

    def begin_backward(self) -> None:
        """Before a pass inside the pass that runs now."""
        if self.sharding is not None:
            self.sharding.begin_backward()

    def _run(
        self, made: Source, wide: bool, name: str, learns: bool, copies: Mapping[int, Tensor] = {}
    ) -> Sequence[Tensor]:
        own = replace(made, inputs=[copies.get(id(x), x) for x in made.inputs])
        # nor where the caller is in inference_mode: what he is given may be part of a loss
        with torch.inference_mode(False), torch.set_grad_enabled(learns), _compat.no_autocast():
            if self.sharding is None:
                return self._values(own, wide, name)
            found: Sequence[Tensor] = self.sharding.outside(
                lambda: self._values(own, wide, name), made.inputs
            )
            return found

    def _values(self, made: Source, wide: bool, name: str) -> Sequence[Tensor]:
        program = self._program(made)
        bound = program.backend.roles is not None and torch.is_grad_enabled()
        if wide:
            self._tell(name, f"makes the logits whole at {_line()}")
        if wide and not bound:
            return _plain(program, made.inputs)
        try:
            with (
                _compat.capture_config(), uniform(made.inputs, {}) as (own, _),
                warnings.catch_warnings(),
            ):  # fmt: skip
                # Dynamo asks for the gradient of inputs that are no leaves
                warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", UserWarning)
                for x in own:
                    if not isinstance(x, nn.Parameter):
                        mark_dynamic(x)
                found: Sequence[Tensor] = program.compiled(*own)
                return found
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if bound:
                raise
            what = error.what if isinstance(error, FxmemError) else str(error).split("\n")[0]
            result = _plain(program, made.inputs)  # a fault of the values is raised here
            self._tell(name, f"at {_line()} runs on whole logits, since {what}")
            return result

    def _program(self, made: Source) -> Program:
        learns = torch.is_grad_enabled()
        text = made.text if learns else f"{made.text}  # without gradients"
        program = self.programs.get(text) or _PROGRAMS.get((self.key, text))
        if program is None:
            plain, backend = made.function(), self.backend(learns)
            compiled = torch.compile(  # type: ignore[call-overload]  # the stub lacks some
                plain, backend=backend, fullgraph=True, isolate_recompiles=True, recompile_limit=64
            )
            program = Program(plain, backend, compiled, made.calls)
            if backend.roles is None:  # which are those of one model
                _PROGRAMS[self.key, text] = program
        return self.programs.setdefault(text, program)

    def _tell(self, name: str, what: str) -> None:
        if name not in self.told:
            self.told.add(name)
            warnings.warn(f"{name} {what}; exact, not streamed; {KEEP}", FxmemWarning, stacklevel=2)


def _plain(program: Program, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    with _terms(program, inputs):
        found: Sequence[Tensor] = program.plain(*inputs)
    return found


def _terms(program: Program, inputs: Sequence[Tensor]) -> contextlib.AbstractContextManager[Any]:
    """Low-rank terms of the weights among the inputs, where nothing learns."""
    roles = program.backend.roles
    if roles is None:
        return contextlib.nullcontext()
    table, weights = roles.table(), [x for x in inputs if isinstance(x, nn.Parameter)]
    beside = {w: table.adapter(roles.shard(w)) for w in weights}
    return Terms(lambda: {w: a for w, a in beside.items() if a is not None})


def _unchanged(nodes: Sequence[Node]) -> None:
    """
    Raises:
        ModifiedParameterError: what the recorded calls read is not what it was.
    """
    for node in nodes:
        if any(version(t) != v for t, v in node.versions):
            name = origin.name_of(node.target)
            raise ModifiedParameterError(
                f"a tensor that {name} on the logits reads was changed in place before its result "
                "was wanted", source=_line(),
                advice="read what depends on the logits before optimizer.step() and other changes "
                f"in place; {KEEP}",
            )  # fmt: skip


def _line() -> str:
    """The innermost line of the caller's that is neither ours nor torch's."""
    return str(origin.calling_line())


def _head(late: Late, values: Sequence[Any], sizes: dict[str, int], head: Head) -> Node:
    """The nodes of a late output's region; the last of them."""
    region = late.region
    capture = region.capture

    def sized(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(map(sized, value))
        return evaluate(canonical(value, capture.symbols), sizes)

    env: dict[fx.Node, Any] = dict(zip(region.inputs, values, strict=True))
    env |= {n: sized(value_of(n)) for n in capture.inputs if n not in env and is_size(value_of(n))}
    for n in region.nodes:
        if is_size(value_of(n)):
            env[n] = sized(value_of(n))
        elif n.op == "get_attr":
            env[n] = attribute(capture.gm, str(n.target))
        else:
            form = "method" if n.op == "call_method" else "function"
            args, kwargs = fx.map_arg((n.args, n.kwargs), lambda a: env[a])
            under = capture.contexts[n]
            under = replace(under, grad=under.grad and head.learns)
            env[n] = Node(form, n.target, args, kwargs, under, None, Memory())
    node: Node = env[region.outputs[0]]
    if head.learns:
        node.sources = tuple(v for v in values if isinstance(v, Tensor) and v.requires_grad)
    shape = sized(tuple(late.value.shape))
    with MODE, torch.enable_grad():
        node.fake = torch.empty(shape, dtype=late.value.dtype, device=late.value.device)
        if node.sources:
            node.fake = node.fake.requires_grad_().clone()
    node.rows = node.fake.numel() // max(1, shape[-1])
    node.heads = frozenset((head,))
    node.versions = [(v, version(v)) for v in values if isinstance(v, Tensor)]
    return node
