"""A transformed model and its plain twin, driven through the same life: forwards, backwards of
parts, hooks, frozen and tied parameters, exceptions, threads. After every step both agree, or a
named error has left everything as it was.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
import twins
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch import Tensor, nn

import fxmem

OUTPUTS = st.dictionaries(
    st.sampled_from(["loss", "aux", "hidden", "pooled"]), st.sampled_from([1.0, -0.5]),
    min_size=1, max_size=2,
)  # fmt: skip
NAMES = [name for name, _ in twins.Net().named_parameters()]
SOME = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True)
FREEZABLE = ("embed.weight", "layers.1.up.weight")


def double(grad: Tensor) -> Tensor:
    return grad * 2


def gradients_of(module: nn.Module, args: Any, output: Tensor) -> None:
    if output.requires_grad:
        output.register_hook(double)


HOOKS: dict[str, Callable[[Any], Any]] = {
    "forward": lambda net: net.layers[0].register_forward_hook(lambda m, a, o: o * 1.5),
    "pre": lambda net: net.layers[1].norm.register_forward_pre_hook(lambda m, a: (a[0] + 1,)),
    "backward": lambda net: net.layers[0].register_full_backward_hook(
        lambda m, i, o: (i[0] * 2,) if i[0] is not None else None
    ),
    "tensor": lambda net: net.layers[1].up.register_forward_hook(gradients_of),
    "parameter": lambda net: net.layers[1].down.weight.register_hook(double),
}


def inputs(batch: int, length: int, seed: int, layout: str) -> Tensor:
    """Token ids of one value in several layouts."""
    if layout == "view":
        return twins.ids(batch, length + 3, seed)[:, 2 : 2 + length]
    if layout == "expanded":
        return twins.ids(1, length, seed).expand(batch, -1)
    if layout == "strided":
        return twins.ids(length, batch, seed).t()
    return twins.ids(batch, length, seed)


IDS = st.builds(
    inputs, st.sampled_from([1, 2]), st.sampled_from([6, 13]), st.integers(0, 3),
    st.sampled_from(["fresh", "view", "expanded", "strided"]),
)  # fmt: skip


class Stop(BaseException):
    """Not an ``Exception``, like ``KeyboardInterrupt``."""


class Life(RuleBasedStateMachine):
    """``graphs``: outputs of both models whose backward may still come."""

    models: tuple[Any, Any]

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.net = self.models
        self.graphs: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
        self.handles: dict[str, list[Any]] = {}
        self.own = [m.layers[1].mix.weight for m in self.models]

    @initialize()
    def begin(self) -> None:
        for model in self.models:
            model.train().requires_grad_(True)
            model.zero_grad()
            with torch.no_grad():
                for (_, p), value in zip(model.named_parameters(), self.start, strict=True):
                    p.copy_(value)

    def teardown(self) -> None:
        for handles in self.handles.values():
            for handle in handles:
                handle.remove()
        for model, weight in zip(self.models, self.own, strict=True):
            model.layers[1].mix.weight = weight

    def agree(self) -> None:
        twins.same_gradients(self.net, self.plain)

    @contextmanager
    def both(self) -> Iterator[Callable[[Callable[[Any, int], Any]], Any]]:
        """Run something on both models; where one of them refuses, nothing has changed."""

        def run(act: Callable[[Any, int], Any]) -> tuple[Any, Any] | None:
            before = [None if p.grad is None else p.grad.clone() for p in self.net.parameters()]
            values = [p.detach().clone() for p in self.net.parameters()]
            try:
                got = act(self.net, 1)
            except fxmem.FxmemError:
                for p, grad, value in zip(self.net.parameters(), before, values, strict=True):
                    twins.same(p.grad, grad)
                    assert torch.equal(p, value)
                return None
            try:
                return act(self.plain, 0), got
            except RuntimeError:  # plain PyTorch needs a saved tensor that fxmem does not
                for p, q in zip(self.plain.parameters(), self.net.parameters(), strict=True):
                    p.grad = None if q.grad is None else q.grad.clone()
                return None

        yield run
        self.agree()

    @rule(ids=IDS)
    def forward(self, ids: Tensor) -> None:
        with self.both() as run:
            found = run(lambda model, _: model(ids))
            assert found is not None, "a forward was refused"
            for name, want in found[0].items():
                twins.same(found[1][name], want, name)
            self.graphs = [*self.graphs[-2:], found]

    @precondition(lambda self: self.graphs)
    @rule(
        weights=OUTPUTS, names=SOME, at=st.integers(0, 2), retain=st.booleans(),
        how=st.sampled_from(["all", "inputs", "grad"]), thread=st.booleans(),
    )  # fmt: skip
    def backward(
        self, weights: dict[str, float], names: list[str], at: int, retain: bool, how: str,
        thread: bool,
    ) -> None:  # fmt: skip
        graph = self.graphs[at % len(self.graphs)]

        def act(model: Any, which: int) -> Any:
            wanted = [p for p in (model.get_parameter(n) for n in names) if p.requires_grad]
            target = sum(graph[which][k].square().sum() * w for k, w in weights.items())
            assert isinstance(target, Tensor)
            if not target.requires_grad or not wanted:
                return []
            if how == "grad":
                return torch.autograd.grad(target, wanted, retain_graph=retain, allow_unused=True)
            given = {"inputs": wanted} if how == "inputs" else {}
            target.backward(retain_graph=retain, **given)
            return []

        with self.both() as run:
            for a, b in zip(*(run(threaded(act) if thread else act) or ([], [])), strict=True):
                twins.same(b, a)

    @precondition(lambda self: self.graphs)
    @rule(name=st.sampled_from(NAMES), stop=st.sampled_from([ValueError, Stop]))
    def exception_in_backward(self, name: str, stop: type[BaseException]) -> None:
        """Which gradients have been added to by then is a matter of order; both begin anew."""

        def fail(grad: Tensor) -> None:
            raise stop

        for model, outputs in zip(self.models, self.graphs[-1], strict=True):
            parameter = model.get_parameter(name)
            if not parameter.requires_grad:
                return
            handle = parameter.register_hook(fail)
            with suppress(stop, fxmem.FxmemError, RuntimeError):
                outputs["loss"].backward(retain_graph=True)
            handle.remove()
            model.zero_grad()
        self.agree()

    @rule(ids=IDS, stop=st.sampled_from([ValueError, Stop]))
    def exception_in_forward(self, ids: Tensor, stop: type[BaseException]) -> None:
        def fail(module: nn.Module, args: Any) -> None:
            raise stop

        for model in self.models:
            handle = model.layers[1].up.register_forward_pre_hook(fail)
            with pytest.raises((stop, fxmem.FxmemError)):
                model(ids)
            handle.remove()
        self.agree()

    @rule(kind=st.sampled_from(sorted(HOOKS)))
    def hook(self, kind: str) -> None:
        """One at a time: each set of hooks is a capture."""
        there = kind in self.handles
        for handles in self.handles.values():
            for handle in handles:
                handle.remove()
        self.handles = {} if there else {kind: [HOOKS[kind](m) for m in self.models]}

    @rule(name=st.sampled_from(FREEZABLE))
    def freeze(self, name: str) -> None:
        for model in self.models:
            p = model.get_parameter(name)
            p.requires_grad_(not p.requires_grad)

    @rule()
    def tie(self) -> None:
        for model, own in zip(self.models, self.own, strict=True):
            layers = model.layers
            tied = layers[1].mix.weight is layers[0].mix.weight
            layers[1].mix.weight = own if tied else layers[0].mix.weight

    @rule(none=st.booleans())
    def zero_grad(self, none: bool) -> None:
        for model in self.models:
            model.zero_grad(set_to_none=none)
        self.agree()

    @rule()
    def step(self) -> None:
        for model in self.models:
            torch.optim.SGD(model.parameters(), lr=0.01).step()
        for p, q in zip(self.net.parameters(), self.plain.parameters(), strict=True):
            twins.same(p, q)

    @rule(ids=IDS, inference=st.booleans())
    def evaluate(self, ids: Tensor, inference: bool) -> None:
        with torch.inference_mode() if inference else torch.no_grad():
            want, got = (model(ids)["loss"] for model in self.models)
        twins.same(got, want)

    @rule()
    def evaluation_mode(self) -> None:
        for model in self.models:
            model.train(not model.training)

    @rule(ids=IDS)
    def a_copy(self, ids: Tensor) -> None:
        """A copy streams as well."""
        plain = copy.deepcopy(self.plain)
        twin = copy.deepcopy(self.net)
        for model in (plain, twin):
            model.zero_grad()
            model(ids)["aux"].backward()
        twins.same_gradients(twin, plain)
        fxmem.restore(twin)

    @rule(ids=IDS)
    def restored(self, ids: Tensor) -> None:
        fxmem.restore(self.net)
        with self.both() as run:
            run(lambda model, _: model(ids)["loss"].backward())
        fxmem.transform(self.net, twins.PLAN)


def threaded(act: Callable[[Any, int], Any]) -> Callable[[Any, int], Any]:
    """``act`` in a thread of its own."""

    def call(model: Any, which: int) -> Any:
        result: list[Any] = []

        def run() -> None:
            try:
                result.append((act(model, which), None))
            except BaseException as error:
                result.append((None, error))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        value, error = result[0]
        if error is not None:
            raise error
        return value

    return call


def live(examples: int, steps: int) -> None:
    class Machine(Life):
        models = twins.pair()
        start = tuple(p.detach().clone() for p in models[0].parameters())

    run = Machine.TestCase()
    run.settings = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    run.runTest()


def test_a_short_life() -> None:
    live(3, 10)


@pytest.mark.slow
def test_a_long_life() -> None:
    live(60, 40)
