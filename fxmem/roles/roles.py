"""Roles: what the backward of a step does with each parameter.

BREAD (Luo et al., NeurIPS 2025) trains one block of a model with AdamW and gives the others a cheap
update from the same backward. A :class:`RoleTable` says for every parameter which of the two it is,
or neither; the compiler reads it at every forward and selects variants of its programs. The flag
``requires_grad`` stays as it is: what a step learns is the table's word alone.
"""

from __future__ import annotations

import enum
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxmem.errors import RoleError
from fxmem.roles.kernel_update import Rule


class Role(enum.Enum):
    """What becomes of a parameter's gradient.

    ACTIVE: it is returned to autograd and lands in ``.grad``.
    UPDATE: the backward hands it to :meth:`RoleTable.update` and drops it.
    LOW_RANK: it is never formed; the gradients of the parameter's :class:`Adapter` are returned. A
        parameter without adapter (a norm) does not learn.
    FROZEN: it is never formed.
    """

    ACTIVE = "active"
    UPDATE = "update"
    LOW_RANK = "low_rank"
    FROZEN = "frozen"


@dataclass(frozen=True)
class Adapter:
    """A low-rank term beside a weight ``[m, n]``: the model computes with ``W + scale * up @ down``
    but never forms it.

    Attributes:
        up: ``[m, r]``. For ``nn.Linear``, whose weight is ``[out, in]``, the output side.
        down: ``[r, n]``.
        scale: a constant of the run.
    """

    up: nn.Parameter
    down: nn.Parameter
    scale: float


Update = Callable[[nn.Parameter, Tensor], None]


class RoleTable:
    """Roles by parameter, the in-backward update, and the gradients that wait for it.

    A weight may be read several times in a step: tied, in several forwards before one backward. So
    every forward region that will hand in a gradient *expects* it, the backward *completes* it, and
    the update runs with the sum when nothing is expected any more. :meth:`flush` applies what a
    backward that never ran left behind; call it before the optimizer's step.

    Args:
        roles: role of each parameter; one that is not named is ACTIVE if it requires a gradient.
        update: ``update(parameter, gradient)`` changes the parameter in place. It is called under
            ``no_grad``, once per backward, when nothing reads the parameter any more.
        adapters: adapter of each parameter that has one. An adapter takes part in the forward
            whatever the parameter's role; it learns under LOW_RANK only.
    """

    def __init__(
        self,
        roles: Mapping[nn.Parameter, Role] | None = None,
        update: Update | None = None,
        adapters: Mapping[nn.Parameter, Adapter] | None = None,
    ) -> None:
        self._roles = dict(roles or {})
        self._update = update
        self._adapters = dict(adapters or {})
        self._expected: dict[nn.Parameter, int] = {}
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._arrived: dict[nn.Parameter, None] = {}
        self._hooked: set[nn.Parameter] = set()
        self.generation = 0

    def role(self, parameter: nn.Parameter) -> Role:
        default = Role.ACTIVE if parameter.requires_grad else Role.FROZEN
        return self._roles.get(parameter, default)

    def adapter(self, parameter: nn.Parameter) -> Adapter | None:
        return self._adapters.get(parameter)

    def adapters_of_all(self) -> Mapping[nn.Parameter, Adapter]:
        """By weight, for a call that learns nothing."""
        return self._adapters

    def rule(self, parameter: nn.Parameter) -> Rule | None:
        """How a kernel may move ``parameter`` in the pass that forms its gradient; None where the
        gradient itself is needed.
        """
        return None

    def tell_order(self, first_use: Mapping[nn.Parameter, int]) -> None:
        """Before the roles of a forward are read: where its graph first reads each parameter."""

    def update(self, parameter: nn.Parameter, grad: Tensor) -> None:
        """Change ``parameter`` in place; ``grad`` is its complete gradient of this backward, in
        float32 at least where the programs sum in it, and is the callee's to overwrite.

        Raises:
            RoleError: the table was built without an update.
        """
        if self._update is None:
            raise RoleError(f"a parameter {tuple(parameter.shape)} has role update, but no update")
        self._update(parameter, grad)

    def sgd_rate(self, parameter: nn.Parameter) -> float | None:
        """Step size, where the update is ``parameter -= rate * grad`` in the parameter's own
        precision; the compiler may then do it itself, without forming the gradient.
        """
        return None

    def factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor] | None:
        """What to use as ``a`` and ``b`` where the compiler adds ``a @ b`` at :meth:`sgd_rate`;
        None where it must form the gradient after all.
        """
        return a, b

    def rehearse(self, parameter: nn.Parameter, weight: Tensor, grad: Tensor) -> bool:
        """On fake tensors: allocate what :meth:`update` does; True if the gradient stays."""
        return False

    def begin_backward(self, number: int) -> None:
        """A backward pass enters the first region of a forward; ``number`` tells passes apart."""

    def expect(self, parameter: nn.Parameter) -> None:
        """A forward has read ``parameter`` and its backward will complete a gradient."""
        self._expected[parameter] = self._expected.get(parameter, 0) + 1

    def forget(self, parameters: Sequence[nn.Parameter]) -> None:
        """One gradient less is expected of each; sums that waited for them wait for the flush."""
        for p in parameters:
            self._expected[p] = max(0, self._expected.get(p, 0) - 1)

    def started(self, parameter: nn.Parameter) -> Tensor | None:
        """The sum so far, handed over to whoever completes the next gradient with it included."""
        return self._sums.pop(parameter, None)

    def last(self, parameter: nn.Parameter) -> bool:
        """One gradient is still expected and no other waits: the next one is the whole sum."""
        return self._expected.get(parameter, 0) <= 1 and parameter not in self._sums

    def complete(self, parameter: nn.Parameter, grad: Tensor | None) -> None:
        """One expected gradient; None where it has been applied already."""
        left = self._expected.get(parameter, 0) - 1
        if grad is not None and (before := self._sums.pop(parameter, None)) is not None:
            grad = before.add_(grad)
        if left > 0:
            self._expected[parameter] = left
            if grad is not None:
                self._sums[parameter] = grad
            return
        self._expected.pop(parameter, None)
        if grad is not None:
            self._apply(parameter, grad)

    def expect_reduced(self, parameter: nn.Parameter) -> None:
        """As :meth:`expect`, of a shard: what shards it reduces the gradient into ``.grad``, which
        is taken from there once nothing more is expected.
        """
        self.expect(parameter)
        if parameter not in self._hooked:
            self._hooked.add(parameter)
            parameter.register_post_accumulate_grad_hook(_taker(self))

    def arrive(self, parameter: nn.Parameter) -> None:
        """One expected gradient of a shard is on its way to be reduced."""
        self.forget([parameter])
        self._arrived[parameter] = None

    def take_reduced(self, parameter: nn.Parameter) -> None:
        """Apply a shard's gradient; another table's, or one that waits for more, stays."""
        if parameter in self._arrived and not self._expected.get(parameter):
            self._arrived.pop(parameter)
            grad, parameter.grad = parameter.grad, None
            if grad is not None:
                self._apply(parameter, grad)

    def flush(self) -> None:
        """Apply the gradients that still wait and forget what was expected.

        Backwards of forwards before this call raise
        :class:`~fxmem.errors.ModifiedParameterError`.
        """
        self._expected.clear()
        for parameter in list(self._sums):
            self._apply(parameter, self._sums.pop(parameter))
        for parameter in list(self._arrived):
            self.take_reduced(parameter)
        self.generation += 1

    @property
    def waiting(self) -> list[nn.Parameter]:
        """Parameters with a gradient that waits for another one."""
        return list(self._sums)

    def _apply(self, parameter: nn.Parameter, grad: Tensor) -> None:
        with torch.no_grad():
            self.update(parameter, grad)


class ReadOnly(RoleTable):
    """Of a call that learns nothing: adapters take part, and every parameter is FROZEN."""

    def role(self, parameter: nn.Parameter) -> Role:
        return Role.FROZEN


def _taker(table: RoleTable) -> Callable[[Tensor], None]:
    """A hook that does not keep the table alive."""
    this = weakref.ref(table)

    def take(parameter: Tensor) -> None:
        if (alive := this()) is not None:
            alive.take_reduced(parameter)  # type: ignore[arg-type]

    return take


@dataclass(slots=True)
class RoleSource:
    """Where a compiled model reads its roles at every forward.

    Attributes:
        table: the table in force, or None: every parameter that requires a gradient is ACTIVE.
        armed: updates may happen: the model is in training mode.
        follow: told before a call of a model whose parameters are shards.
        inside: told before a call in which DistributedDataParallel it is, or None.
        shard: of a parameter that is whole for the time of a call: the one that roles are of.
        reading: the source of calls without gradients, where there are adapters.
    """

    table: Callable[[], RoleTable | None]
    armed: bool = True
    follow: Callable[[], None] = lambda: None
    inside: Callable[[Any], None] = lambda wrapper: None
    shard: Callable[[Any], Any] = lambda parameter: parameter
    reading: RoleSource | None = None


__all__ = ["Adapter", "ReadOnly", "Role", "RoleSource", "RoleTable", "Update"]
