"""Stateless random: every random ATen op becomes a function of uniform numbers.

A generator hands out other numbers each time it is asked, so a value drawn from it cannot be made
again: not for another chunk, not in the backward. ``fxmem::uniform`` can, and every distribution is
a function of uniform numbers. The rewrite happens below autograd while a graph is traced, so that
whatever ends in a random op (``dropout1d``, ``gumbel_softmax``, ``tensor.normal_()``) is covered.
"""

from __future__ import annotations

import itertools
import keyword
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxmem._compat import graph as _compat
from fxmem.errors import UnsupportedOpError
from fxmem.frontend.origin import module_path, source_line
from fxmem.kernels.uniform import uniform

Arguments = Mapping[str, Any]


class StatelessRandom(_compat.TorchDispatchMode):
    """``site`` gives the seed and a number of its own to each draw.

    Args:
        node: the node under trace, for errors.
        wanted: whether the draw with operands of these shapes is to be rewritten if it can be. The
            default is all of them, and an error where one cannot be.
    """

    def __init__(
        self, site: Callable[[], tuple[Tensor, int]], node: Callable[[], fx.Node | None],
        wanted: Callable[[Sequence[Sequence[Any]]], bool] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.site, self.node, self.wanted = site, node, wanted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _compat.is_random(func):
            return func(*args, **kwargs)
        given = _compat.named_arguments(func, args, kwargs)
        name = func.overloadpacket.__name__
        form = FORMS.get(name.removesuffix("_"))
        if given.get("generator") is not None or "out" in given:
            form = None
        # a graph cannot name `random_.from`
        optional = self.wanted is not None and not keyword.iskeyword(func._overloadname)
        wanted = self.wanted is None or form is not None and self.wanted(_shapes(given))
        if _draws_nothing(given) or (optional and not wanted):
            return func(*args, **kwargs)
        if form is None:
            raise self.refusal(name, given)
        result = form(Draws(self.site, given), given)
        if not name.endswith("_"):
            return result
        given["self"].copy_(result)
        return given["self"]

    def refusal(self, name: str, given: Arguments) -> UnsupportedOpError:
        node = self.node()
        own = given.get("generator") is not None
        return UnsupportedOpError(
            f"random op `{name}`" + (" with a generator of its own" if own else "")
            + ", whose numbers cannot be drawn again in the backward", op=f"aten.{name}",
            module=module_path(node) if node else None, source=source_line(node) if node else None,
            advice="draw them before the call and pass them in as an input, or use "
            + ("torch's default generator" if own else "uniform or normal numbers"),
        )  # fmt: skip


def drawn_once(wanted: Callable[[Sequence[Sequence[Any]]], bool]) -> StatelessRandom:
    """For a graph that runs once per call: it draws the seed itself, where it needs one."""
    seeds: list[Tensor] = []
    numbers = itertools.count(1)

    def site() -> tuple[Tensor, int]:
        if not seeds:
            seeds.append(torch.randint(2**31, (), device="cpu"))
        return seeds[0], next(numbers)

    return StatelessRandom(site, lambda: None, wanted)


def _draws_nothing(given: Arguments) -> bool:
    rate = given.get("dropout_p", given.get("dropout"))
    return rate == 0 or given.get("train") is False or given.get("training") is False


def _shapes(given: Arguments) -> list[Sequence[Any]]:
    """Shapes of the tensors of a call, else the sizes it asks for."""
    tensors: list[Sequence[Any]] = [v.shape for v in given.values() if isinstance(v, Tensor)]
    size = given.get("size", (given.get("n"),))
    return tensors or [size]


@dataclass(frozen=True, slots=True)
class Draws:
    """Uniform and normal numbers for one call: of the shape, type and device of its result."""

    site: Callable[[], tuple[Tensor, int]]
    given: Arguments

    @property
    def like(self) -> Tensor | None:
        like = self.given.get("self", self.given.get("input"))
        return like if isinstance(like, Tensor) else None

    @property
    def dtype(self) -> torch.dtype:
        dtype = self.given.get("dtype")
        if isinstance(dtype, torch.dtype):
            return dtype
        if self.like is not None:
            return self.like.dtype
        return torch.get_default_dtype() if dtype is None else torch.int64

    @property
    def shape(self) -> Sequence[Any]:
        return self.given["size"] if self.like is None else self.like.shape

    @property
    def device(self) -> torch.device:
        device = self.given.get("device")
        if device is not None:
            return torch.device(device)
        return torch.get_default_device() if self.like is None else self.like.device

    def uniform(
        self, shape: Sequence[Any] | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Numbers in [0, 1): in float64 for integers too, which need the digits."""
        dtype = dtype or self.dtype
        narrow = dtype.is_floating_point and dtype.itemsize <= 4
        wide = torch.float32 if narrow else torch.float64
        seed, site = self.site()
        size = list(self.shape if shape is None else shape)
        return uniform(seed, size, site, [], wide, self.device)

    def normal(self, shape: Sequence[Any] | None = None) -> Tensor:
        """Box and Muller's transform of two uniform numbers."""
        radius = (-2 * torch.log1p(-self.uniform(shape))).sqrt()
        return radius * torch.cos(self.uniform(shape) * (2 * math.pi))

    def exponential(self) -> Tensor:
        """Never zero, as in torch: its logarithm is taken."""
        u = self.uniform()
        return (-torch.log1p(-u)).clamp_min(torch.finfo(u.dtype).eps / 2)

    def result(self, value: Tensor) -> Tensor:
        """``value`` in the type of the result, and as its operand lies in memory."""
        value = value.to(self.dtype)
        if self.like is None or self.like.shape != value.shape or self.like.is_contiguous():
            return value
        return torch.empty_like(self.like, dtype=self.dtype).copy_(value)


def _rand(draws: Draws, given: Arguments) -> Tensor:
    u = draws.uniform()
    if draws.dtype.itemsize < 4:  # rounding must not give 1
        steps = 2 / torch.finfo(draws.dtype).eps
        u = (u * steps).floor() / steps
    low, high = given.get("from", 0.0), given.get("to", 1.0)
    return draws.result(u if (low, high) == (0.0, 1.0) else u * (high - low) + low)


def _randn(draws: Draws, given: Arguments) -> Tensor:
    return draws.result(draws.normal())


def _normal(draws: Draws, given: Arguments) -> Tensor:
    mean, std = given["mean"], given["std"]
    tensors = [v for v in (mean, std) if isinstance(v, Tensor)]
    if draws.like is not None or not tensors:
        return draws.result(draws.normal() * std + mean)
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    like = Draws(draws.site, {"self": tensors[0]})
    return (like.normal(shape) * std + mean).to(tensors[0].dtype)


def _randint(draws: Draws, given: Arguments) -> Tensor:
    low, high = given.get("low", 0), given["high"]
    u = draws.uniform(dtype=torch.int64)
    return draws.result((u * (high - low)).floor() + low)


def _random(draws: Draws, given: Arguments) -> Tensor:
    """Without bounds, up to the largest integer of the type that has all below it."""
    low, high = given.get("from", 0), given.get("to")
    if high is None:
        dtype = draws.dtype
        high = 2 / torch.finfo(dtype).eps if dtype.is_floating_point else torch.iinfo(dtype).max
        high = int(high) + 1
    return _randint(draws, {"low": low, "high": high})


def _bernoulli(draws: Draws, given: Arguments) -> Tensor:
    p = given.get("p", given["self"])
    u = draws.uniform(dtype=p.dtype if isinstance(p, Tensor) else None)
    return draws.result(u < p)


def _exponential(draws: Draws, given: Arguments) -> Tensor:
    return draws.result(draws.exponential() / given["lambd"])


def _geometric(draws: Draws, given: Arguments) -> Tensor:
    trials = -draws.exponential() / math.log1p(-given["p"])
    return draws.result(trials.ceil().clamp_min(1))


def _log_normal(draws: Draws, given: Arguments) -> Tensor:
    return draws.result((draws.normal() * given["std"] + given["mean"]).exp())


def _cauchy(draws: Draws, given: Arguments) -> Tensor:
    angle = (draws.uniform() - 0.5) * math.pi
    return draws.result(angle.tan() * given["sigma"] + given["median"])


def _randperm(draws: Draws, given: Arguments) -> Tensor:
    return draws.uniform((given["n"],), torch.float64).argsort().to(draws.dtype)


def _multinomial(draws: Draws, given: Arguments) -> Tensor:
    """Without replacement: the first to arrive in a race of exponential clocks."""
    weights, count = given["self"], given["num_samples"]
    if not given["replacement"]:
        return (weights / draws.exponential()).topk(count).indices
    total = weights.to(torch.promote_types(weights.dtype, torch.float32)).cumsum(-1)
    u = draws.uniform((*weights.shape[:-1], count), weights.dtype) * total[..., -1:]
    return torch.searchsorted(total, u, right=True)


def _native_dropout(draws: Draws, given: Arguments) -> tuple[Tensor, Tensor]:
    x, p = given["input"], given["p"]
    keep = draws.uniform() >= p
    return x * keep * (0.0 if p >= 1 else 1 / (1 - p)), keep


def _fused_dropout(draws: Draws, given: Arguments) -> tuple[Tensor, Tensor]:
    """``p`` is the probability to keep an element."""
    x, p = given["self"], given["p"]
    keep = draws.uniform() < p
    return x * keep / p, keep.to(torch.uint8)


def _slopes(draws: Draws, given: Arguments) -> tuple[Tensor, Tensor]:
    x, low, high = given["self"], given["lower"], given["upper"]
    slope = draws.result(draws.uniform() * (high - low) + low)
    slope = torch.where(x <= 0, slope, 1)
    return x * slope, slope


def _rrelu(draws: Draws, given: Arguments) -> Tensor:
    out, slope = _slopes(draws, given)
    given["noise"].copy_(slope)
    return out


FORMS: dict[str, Callable[[Draws, Arguments], Any]] = {
    "rand": _rand, "rand_like": _rand, "uniform": _rand, "randn": _randn, "randn_like": _randn,
    "normal": _normal, "normal_functional": _normal, "randint": _randint, "randint_like": _randint,
    "random": _random, "bernoulli": _bernoulli, "exponential": _exponential,
    "geometric": _geometric, "log_normal": _log_normal, "cauchy": _cauchy, "randperm": _randperm,
    "multinomial": _multinomial, "native_dropout": _native_dropout,
    "_fused_dropout": _fused_dropout, "rrelu_with_noise": _rrelu,
    "rrelu_with_noise_functional": _slopes,
}  # fmt: skip
"""ATen op, in-place forms without the underscore -> its result from uniform numbers."""
