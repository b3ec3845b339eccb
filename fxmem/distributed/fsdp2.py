"""Streaming under FSDP2 (``fully_shard``): regions open and close FSDP2's own groups.

For the time of a call the modules hold FSDP2's whole parameters, whose storage is empty while their
group is closed, and FSDP2's module hooks are hidden from the capture. The loop over regions gathers
each group before the first region that uses it, and closes it after the last; a backward gathers
it again, puts the gradients where FSDP2 looks for them, and lets it reduce. So there is one gather
per group and pass and one reduction per group, whatever the number of chunks, in the order of
plain FSDP2: a rank that runs plain by itself (one token) waits for nobody.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxmem._compat import fsdp as _compat
from fxmem._compat import graph as _compat_graph
from fxmem._compat import hooks as _compat_hooks
from fxmem._compat.fsdp import Group
from fxmem.distributed.agreement import agree
from fxmem.distributed.stretches import ModuleCall, stretches
from fxmem.errors import PlanError
from fxmem.frontend.faults import lost
from fxmem.runtime import sharding
from fxmem.streaming.shards import Shards


def of(model: nn.Module) -> ShardedModel | None:
    """The groups of a model; None where its parameters are whole.

    Raises:
        PlanError: they are spread by something under which no region can run.
    """
    if _compat.is_sharded(model):
        sharded = ShardedModel(model)
        if any(group.tensor_parallel for group in sharded.groups):
            raise _tensor_parallel(next(n for n, _ in model.named_parameters()))
        return sharded
    if any(map(_compat.is_sharded, model.modules())):
        raise PlanError(
            f"fully_shard was applied to parts of {type(model).__name__} and not to it",
            advice="apply it to the whole model last, fully_shard(model), and transform that model",
        )
    if (name := _compat.fsdp1_module(model)) is not None:
        raise PlanError(
            f"`{name or type(model).__name__}` is wrapped by FullyShardedDataParallel",
            advice="shard it with fully_shard (FSDP2), which streams",
        )
    if _compat.replicated(model):
        raise PlanError(
            f"replicate was applied to {type(model).__name__}",
            advice="wrap the transformed model by torch.nn.parallel.DistributedDataParallel",
        )
    if (name := _compat.dtensor_parameter(model)) is not None:
        raise _tensor_parallel(name)
    if (name := _compat.zero3_parameter(model)) is not None:
        raise PlanError(
            f"parameter `{name}` is partitioned by DeepSpeed ZeRO-3",
            advice="use ZeRO-1 or ZeRO-2, which keep parameters whole, or fully_shard (FSDP2)",
        )
    return None


def _tensor_parallel(name: str) -> PlanError:
    return PlanError(
        f"parameter `{name}` is a part of a larger one (tensor parallelism), which does not stream",
        advice="load the model without tp_plan or parallelize_module, and shard it with "
        "fully_shard",
    )


class ShardedModel:
    """The groups of one model; a :class:`fxmem.runtime.sharding.Sharding`."""

    def __init__(self, model: nn.Module) -> None:
        known: dict[Any, Group] = {}
        self.model = model
        self.root = _compat.group_of(model, known)
        self.modules = [
            (m, _compat.group_of(m, known)) for m in model.modules() if _compat.is_sharded(m)
        ]
        self.groups = list(known.values())
        groups = dict(self.modules)
        self.paths = {
            path: (groups[m], m)
            for path, m in model.named_modules(remove_duplicate=False) if m in groups
        }  # fmt: skip
        self.owners: dict[Tensor, Group] = {}
        self.shards: dict[Tensor, Tensor] = {}
        self._agreed = False
        self._later: dict[Group, bool] = {}
        """Groups that are read after the call, and so stay whole; whether regions read them too."""
        self._alone: set[Group] = set()
        """Groups that no region has read in a call, but what came after it."""
        self.due = Due(self.in_step)

    @contextlib.contextmanager
    def call(
        self, args: Any, kwargs: Any, facts: Callable[[], Mapping[str, int]] = dict
    ) -> Iterator[tuple[Any, Any]]:
        """A call of the model; gives its arguments, cast by the policy of precision. ``facts``:
        what must be equal on all ranks, compared at the first call.
        """
        if not self._agreed:
            agree(facts(), *next(place for g in self.groups if (place := g.place)))
            self._agreed = True
        self.let_go()
        if self.root.in_backward and _compat_graph.backward_id() < 0:
            self.reset()  # a backward that failed
        given = self.root.open(args, kwargs)
        for group in self.groups:
            for whole, shard in group.whole():
                self.owners[whole], self.shards[whole] = group, shard
            group.show()
        try:
            with self._traced(), sharding.using(self):
                yield given
        finally:
            for group in self.groups:
                group.hide()
        for group, used in self._later.items():
            if not used:
                group.open()
                group.close(stay=True)
        self.root.close(stay=self.root in self._later)
        for group in self._later:
            group.wait(self.let_go)

    @contextlib.contextmanager
    def _traced(self) -> Iterator[None]:
        """The modules without FSDP2's hooks."""
        was = [(m, _compat.hooks_of(m)) for m, _ in self.modules]
        for m, group in self.modules:
            _compat.set_hooks(m, _compat.traced_hooks(m, group))
        try:
            yield
        finally:
            for m, hooks in was:
                _compat.set_hooks(m, hooks)

    def reset(self) -> None:
        """After a call that failed."""
        self.let_go()
        self.due.clear()
        self.root.reset()

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """Where something fails inside, the step is given up."""
        try:
            yield
        except BaseException as error:
            self.reset()
            if (gone := lost(error)) is not None:
                raise gone from error
            raise

    def let_go(self) -> None:
        """Close what waits for a reader after the call that never came."""
        for group in self._later:
            group.let_go()
        self._later.clear()

    def spread(self, inputs: Mapping[str, Any]) -> Shards:
        """How the parameters among the inputs of a graph are spread; the root's group is first."""
        groups = [self.root, *(g for g in self.groups if g is not self.root)]
        mine = {
            name: (groups.index(self.owners[value]), value) for name, value in inputs.items()
            if isinstance(value, Tensor) and value in self.owners
        }  # fmt: skip
        sizes = [0] * len(groups)
        for at, value in set(mine.values()):
            sizes[at] += value.nbytes
        owner = {name: at for name, (at, _) in mine.items()}
        stays = frozenset(i for i, group in enumerate(groups) if group.stays)
        return Shards(self.root.ranks, owner, tuple(sizes), stays)

    def regions(
        self,
        tensors: Sequence[Sequence[Any]],
        learns: Sequence[bool],
        later: Sequence[Any],
        calls: Sequence[Mapping[ModuleCall, bool]],
    ) -> list[Region]:
        """See :class:`fxmem.runtime.sharding.Sharding`."""
        found_later = {self.owners[x] for x in later if isinstance(x, Tensor) and x in self.owners}
        found = [Region(self) for _ in tensors]
        uses: dict[Group, list[int]] = {}
        for i, (region, given) in enumerate(zip(found, tensors, strict=True)):
            for at, value in enumerate(given):
                group = self.owners.get(value) if isinstance(value, Tensor) else None
                if group is not None:
                    region.mine.append((at, value))
                    if group not in region.uses:
                        region.uses.append(group)
                        uses.setdefault(group, []).append(i)
        self._later = {g: g in uses or g is self.root for g in self.groups if g in found_later}
        self._alone |= {g for g, used in self._later.items() if not used}
        # the root is opened and closed by the call, and reduced at the end of the backward
        uses.pop(self.root, None)
        ordered = {g: uses[g] for g in self.groups if g in uses}
        for group, stretch in stretches(ordered, calls, self.paths):
            found[stretch.start].opens.append((group, stretch.again))
            if not stretch.goes_on:
                found[stretch.end].closes.append(group)
            if stretch.again and stretch.entered:
                found[stretch.start].again.append(group)
            elif stretch.entered:
                inside = range(stretch.start, stretch.end + 1)
                learn = (i for i in inside if learns[i] and group in found[i].uses)
                found[next(learn, stretch.start)].reduces.append(group)
        return found

    def whole(self) -> Iterator[tuple[Any, Any]]:
        """The whole parameters, each with this rank's shard; after the root was opened once."""
        return (pair for group in self.groups for pair in group.whole())

    def shard(self, parameter: Tensor) -> Tensor:
        """What an optimizer changes."""
        return self.shards.get(parameter, parameter)

    def outside(self, run: Callable[[], Sequence[Tensor]], inputs: Sequence[Any]) -> Any:
        """``run()`` after the call, where it reads whole parameters among ``inputs``; its backward
        sends what that of the last region would send.
        """
        groups = dict.fromkeys(self.owners[x] for x in inputs if x in self.owners)
        if not all(group.is_open for group in self._later):
            self.let_go()
        stayed = {group for group in groups if group in self._later}
        for group in groups:
            if group not in stayed:
                group.open()
        output = tuple(run())
        if self.root not in groups:
            for x in output:
                if x.requires_grad:
                    x.register_hook(lambda grad: self.root.open_backward())
        states = [x for x in inputs if x not in self.owners and x.requires_grad and not x.is_leaf]
        for group in reversed(groups):
            output = group.let_go(output) if group in stayed else group.close(output)
            self._later.pop(group, None)
            if group in self._alone and states:
                # its gradients are complete when one goes on to the regions
                states[0].register_hook(_reducing(group))
        return output

    def begin_backward(self) -> None:
        """See :class:`fxmem.runtime.sharding.Sharding`."""
        self.root.open_backward()


@dataclass(eq=False, slots=True)
class Region:
    """What one region does for its groups; a :class:`fxmem.runtime.sharding.RegionShards`.

    Attributes:
        uses: groups of its parameters.
        opens: those that FSDP2 gathers here, and whether it has closed them in the middle of it.
        closes: those that no later one uses before they are gathered again.
        again: those that a backward closes and gathers in the middle of it.
        reduces: those that no later region of the backward uses before.
        mine: sharded parameters, by position among its tensors.
    """

    model: ShardedModel
    uses: list[Group] = field(default_factory=list)
    opens: list[tuple[Group, bool]] = field(default_factory=list)
    closes: list[Group] = field(default_factory=list)
    again: list[Group] = field(default_factory=list)
    reduces: list[Group] = field(default_factory=list)
    mine: list[tuple[int, Tensor]] = field(default_factory=list)

    def before_forward(self) -> None:
        """Gather what the region is the first to use."""
        for group, again in self.opens:
            if again:
                group.close()
            group.open()

    def after_forward(self) -> None:
        """Close what it is the last to use."""
        for group in self.closes:
            group.close(stay=group in self.model._later)

    @contextlib.contextmanager
    def backward(self) -> Iterator[None]:
        """Gather what it uses; the root first, which ends the backward."""
        with self.model.in_step():
            self.model.let_go()
            self.model.due.reduce()
            self.model.root.open_backward()
            for group in reversed(self.uses):
                group.open_backward()
            for group in reversed(self.again):
                group.reduce()
                group.open_backward()
            yield

    def take(self, grads: list[Tensor | None], nodes: Sequence[Any]) -> None:
        """FSDP2 reduces them where they are complete."""
        with torch.no_grad():
            for at, parameter in self.mine:
                if nodes[at] is None:
                    grad, grads[at] = grads[at], None
                    if grad is not None:
                        _accumulate(parameter, grad)
                        del grad
                elif grads[at] is not None and _compat_hooks.accumulates_in_this_pass(nodes[at]):
                    self.model.due.wait_for(parameter)
        self.model.due.add(reversed(self.reduces))


class Due:
    """Groups of which a region was the last to make gradients: as under FSDP2's own hooks, they are
    reduced when autograd has added these up, or at the latest before the next region runs. What
    another call in the same pass will add to is not there yet, and closes without.
    """

    def __init__(self, in_step: Callable[[], AbstractContextManager[None]]) -> None:
        self.in_step = in_step
        self.groups: list[Group] = []
        self.waiting: set[Tensor] = set()
        self.hooked: dict[Tensor, Any] = {}

    def wait_for(self, parameter: Tensor) -> None:
        self.waiting.add(parameter)
        if parameter not in self.hooked:
            hook = parameter.register_post_accumulate_grad_hook(self._arrived)
            self.hooked[parameter] = hook

    def _arrived(self, parameter: Tensor) -> None:
        self.waiting.discard(parameter)
        if not self.waiting:
            with self.in_step():
                self.reduce()

    def add(self, groups: Iterable[Group]) -> None:
        self.groups += groups
        if not self.waiting:
            self.reduce()

    def reduce(self) -> None:
        while self.groups:
            self.groups.pop(0).reduce()

    def clear(self) -> None:
        self.groups, self.waiting = [], set()


def _reducing(group: Group) -> Callable[[Tensor], None]:
    return lambda grad: group.reduce()


def _accumulate(parameter: Tensor, grad: Tensor) -> None:
    """As autograd does: in the layout of the parameter."""
    if parameter.grad is not None:
        parameter.grad.add_(grad)
    elif grad.stride() == parameter.stride():
        parameter.grad = grad
    else:
        parameter.grad = torch.empty_like(parameter).copy_(grad)
