"""What a deferred output is to the program that has it, and what happens to it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from twins import VOCAB, D, Layer, ids, same, same_gradients

import fxmem
from fxmem import Plan, Stream
from fxmem.deferred.tensor import Deferred

Twins = tuple[nn.Module, nn.Module]


class Net(nn.Module):
    """``ids [B, T] -> logits [B, T, 5 V], values [B, T]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, D)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.norm, self.value = nn.LayerNorm(D), nn.Linear(D, 1)
        self.head = nn.Linear(D, 5 * VOCAB)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        hidden = self.norm(x)
        return self.head(hidden), self.value(hidden).squeeze(-1)


@pytest.fixture(scope="module")
def twins() -> Iterator[Twins]:
    torch.manual_seed(0)
    plain = Net().double()
    yield plain, fxmem.transform(copy.deepcopy(plain), Plan(stream=Stream(chunk=4, loss_chunk=3)))


def nll(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten())


def programs(net: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = fxmem.api._TRANSFORMED[net].recorder.programs
    return found


def both(twins: Twins, step: Any, *, whole: bool = False, length: int = 13) -> None:
    """``step(net, target)`` returns values to compare; the gradients are compared as well.
    ``whole``: warnings that something does not stream are no errors.
    """
    target = ids(length=length)
    results = []
    for net in twins:
        net.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("always" if whole else "error", fxmem.FxmemWarning)
            results.append(step(net, target))
    for got, want in zip(results[1], results[0], strict=True):
        same(got, want)
    same_gradients(twins[1], twins[0])


def test_looks_like_a_tensor(twins: Twins) -> None:
    logits, values = twins[1](ids())
    assert isinstance(logits, Deferred) and type(values) is Tensor
    assert logits.shape == (2, 13, 5 * VOCAB) and logits.size(-1) == 55 and len(logits) == 2
    assert logits.dtype == torch.float64 and logits.device.type == "cpu" and logits.dim() == 3
    assert logits.requires_grad and logits.grad_fn is not None and not logits.is_leaf
    assert "Deferred" in repr(logits)
    assert not logits.detach().requires_grad and logits.float().dtype == torch.float32
    assert logits.argmax(-1).shape == (2, 13) and logits.max(-1).values.shape == (2, 13)
    assert not programs(twins[1]), "nothing was wanted yet"


def test_two_losses_and_value_head(twins: Twins) -> None:
    def step(net: nn.Module, target: Tensor) -> list[Tensor]:
        logits, values = net(target)
        first, entropy = nll(logits, target), -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
        loss = first + 0.1 * entropy.mean() + values.square().mean()
        loss.backward()
        with torch.no_grad():
            right = (logits.argmax(-1) == 3).double().mean()
        return [loss.detach(), first.detach(), entropy.detach(), right]

    both(twins, step)


def test_losses_one_after_the_other(twins: Twins) -> None:
    def step(net: nn.Module, target: Tensor) -> list[Tensor]:
        logits, _ = net(target)
        first, second = nll(logits, target), logits.square().mean()
        first.backward(retain_graph=True)
        second.backward()
        return [first, second]

    both(twins, step)


def test_accumulation_with_a_number_that_changes(twins: Twins) -> None:
    def step(net: nn.Module, target: Tensor) -> list[Tensor]:
        found = []
        for count in (7, 9, 11):
            loss = F.cross_entropy(
                net(target)[0].flatten(0, 1), target.flatten(), reduction="sum"
            ) / count  # fmt: skip
            torch.autograd.backward([loss])  # not by a function of the tensor
            found.append(loss.item())
        return [torch.tensor(found)]

    before = len(programs(twins[1]))
    both(twins, step)
    assert len(programs(twins[1])) == before + 2


def test_answers_behind_prompts_of_any_length_are_one_program(twins: Twins) -> None:
    """As PPO and online DPO score them: from the last token of the prompt to the last but one."""
    before = len(programs(twins[1]))
    for prompt, answer in ((20, 13), (23, 11), (11, 30), (40, 14)):

        def step(net: nn.Module, target: Tensor, prompt: int = prompt) -> list[Tensor]:
            found = net(target)[0][:, prompt - 1 : -1].log_softmax(-1)
            loss = -found.gather(-1, target[:, prompt:, None]).mean()
            loss.backward()
            return [loss]

        both(twins, step, whole=True, length=prompt + answer)
    assert len(programs(twins[1])) == before + 1


def test_writes_in_place(twins: Twins) -> None:
    def step(net: nn.Module, target: Tensor) -> list[Tensor]:
        logits = net(target)[0]
        shifted = logits[:, :-1]
        logits /= 0.7
        shifted.mul_(2.0)
        loss = F.cross_entropy(shifted.flatten(0, 1), target[:, 1:].flatten()) + logits.mean()
        loss.backward()
        return [loss]

    both(twins, step, whole=True)  # a slice put back has no row
    assert list(programs(twins[1]).values())[-1].backend.graphs


def test_items_are_assigned(twins: Twins) -> None:
    def step(net: nn.Module, target: Tensor) -> list[Tensor]:
        logits = net(target)[0]
        logits[..., 3] = -5.0
        loss = nll(logits, target)
        loss.backward()
        return [loss]

    both(twins, step, whole=True)  # one operator has no row
    assert list(programs(twins[1]).values())[-1].backend.graphs


def test_an_operator_is_named_once_with_the_callers_line(twins: Twins) -> None:
    """Whatever the loss it is part of, and not by a line of the text that fxmem wrote."""
    net = copy.deepcopy(twins[1])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", fxmem.FxmemWarning)
        for weight in (0, 1):
            logits = net(ids())[0]
            logits[..., 3] = -5.0
            loss = nll(logits, ids())
            (loss + logits.square().mean() if weight else loss).backward()
    messages = [str(w.message) for w in told]
    operators = [m.split(" ")[0] for m in messages]
    assert "aten.fill.Tensor" in operators and len(operators) == len(set(operators))
    assert "test_recording.py" in messages[0] and not any("<recorded" in m for m in messages)


def test_unknown_calls_get_the_values(twins: Twins) -> None:
    def step(net: nn.Module, target: Tensor) -> list[Tensor]:
        logits = net(target)[0]
        loss = logits[logits > 0].sum() + nll(logits, target)
        loss.backward()
        return [loss]

    with pytest.warns(fxmem.FxmemWarning, match=r"__getitem__ makes the logits whole.*test_rec"):
        both(twins, step, whole=True)
    both(twins, step)  # told once


class Twice(torch.autograd.Function):
    """Its gradient is not that of what it computes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.exp()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


def test_gradients_of_custom_functions(twins: Twins) -> None:
    def step(net: nn.Module, target: Tensor) -> list[Tensor]:
        logits = net(target)[0]
        loss = Twice.apply(logits).mean() + Twice.apply(nll(logits, target))
        loss.backward()
        return [loss]

    with pytest.warns(fxmem.FxmemWarning, match="makes the logits whole"):
        both(twins, step, whole=True)


def test_autograd_grad_and_hooks(twins: Twins) -> None:
    def step(net: nn.Module, target: Tensor) -> list[Tensor]:
        loss = nll(net(target)[0], target)
        seen: list[Tensor] = []
        loss.register_hook(seen.append)
        return [*torch.autograd.grad(loss, [net.head.weight, net.embed.weight]), *seen]

    both(twins, step)


def test_changed_before_it_was_read(twins: Twins) -> None:
    net = copy.deepcopy(twins[1])
    target = ids()
    logits = net(target)[0]
    with torch.no_grad():
        net.head.weight.add_(1.0)
    with pytest.raises(fxmem.ModifiedParameterError, match=r"before optimizer.step\(\)"):
        logits.mean().item()


def test_keep_gives_plain_logits(twins: Twins) -> None:
    net = fxmem.transform(
        copy.deepcopy(twins[0]), Plan(stream=Stream(chunk=4, loss_chunk=3, logits="keep"))
    )
    assert type(net(ids())[0]) is Tensor


def test_compiled_loss(twins: Twins) -> None:
    compiled = torch.compile(nll, backend="eager")

    def step(net: nn.Module, target: Tensor) -> list[Tensor]:
        loss = (nll if net is twins[0] else compiled)(net(target)[0], target)
        loss.backward()
        return [loss]

    both(twins, step)
