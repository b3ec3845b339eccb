"""The setups of ``benchmarks.blocks``: how each trains, as its users would write it."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import fxmem
from fxmem.blocks.attach import state_of
from fxmem.demo.models import enable_checkpointing

BETAS, DECAY = (0.9, 0.999), 0.01
RANK, ALPHA = 8, 32.0
"""Of low-rank terms, in fxmem and in peft alike (the BREAD paper's r = 8, s = 4)."""


@dataclass(frozen=True)
class Rates:
    """Step sizes: ``adam`` of AdamW on whole matrices, ``block`` of the active block, ``sgd`` of
    inactive weights, ``low_rank`` of low-rank terms.
    """

    adam: float = 1e-4
    block: float = 1e-4
    sgd: float = 1e-2
    low_rank: float = 1e-4


@dataclass(frozen=True)
class Setup:
    """One row of the benchmark.

    Attributes:
        label: what tables call it.
        blocks: it trains one block at a time, so that a pass has as many steps as blocks.
        needs: package beside the project's own that it needs.
        rates: the step sizes it takes, names of :class:`Rates`.
    """

    label: str
    blocks: bool = False
    needs: str = ""
    rates: tuple[str, ...] = ("adam",)


SETUPS: dict[str, Setup] = {
    "adamw": Setup("AdamW"),
    "adamw+checkpoint": Setup("AdamW, checkpointing"),
    "badam": Setup(
        "badam 1.4 from PyPI, checkpointing", blocks=True, needs="badam", rates=("block",)
    ),
    "fxmem-badam": Setup("fxmem, inactive blocks frozen (BAdam)", blocks=True, rates=("block",)),
    "bread-sgd": Setup("fxmem, SGD on deeper blocks (BREAD)", blocks=True, rates=("block", "sgd")),
    "bread-lora": Setup(
        "fxmem, low rank on deeper blocks (BREAD)", blocks=True, rates=("block", "low_rank")
    ),
    "bread-sgd-all": Setup("fxmem, SGD on all blocks (BREAD)", blocks=True, rates=("block", "sgd")),
    "lora": Setup("LoRA (peft), checkpointing", needs="peft", rates=("low_rank",)),
}


@dataclass
class Training:
    """A model that is ready to train.

    Attributes:
        model: the module that is called.
        optimizer: its ``step`` is called after every backward.
        count: blocks; 1 where there are none.
        state: tensors that the optimizer keeps between steps, masters included.
        terms: parameters that the setup added to the model.
    """

    model: Any
    optimizer: torch.optim.Optimizer
    count: int = 1
    state: Callable[[], list[Tensor]] = list
    terms: tuple[nn.Parameter, ...] = ()

    def step(self, ids_BT: Tensor) -> float:
        """One training step; returns the loss before it."""
        loss = self.forward(ids_BT)
        loss.backward()
        self.update()
        return float(loss.detach())

    def forward(self, ids_BT: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        return loss

    def update(self) -> None:
        self.optimizer.step()
        for p in self.model.parameters():
            p.grad = None

    def state_bytes(self) -> int:
        """Of optimizer state, alive now."""
        return sum(t.nbytes for t in self.state())


def missing(setup: Setup) -> str | None:
    """Why the setup cannot run here, or None."""
    if setup.needs and importlib.util.find_spec(setup.needs) is None:
        return f"not installed: pip install {setup.needs}"
    return None


def plan(name: str, base: fxmem.Blocks, rates: Rates) -> fxmem.Plan:
    """The plan of a setup of fxmem."""
    low_rank = fxmem.LowRank(rank=RANK, alpha=ALPHA, lr=rates.low_rank)
    changes: dict[str, Any] = {
        "fxmem-badam": {"inactive": None},
        "bread-sgd": {"inactive": fxmem.SGD(rates.sgd)},
        "bread-sgd-all": {"inactive": fxmem.SGD(rates.sgd), "reach": "all"},
        "bread-lora": {"inactive": low_rank},
    }[name]
    return fxmem.Plan(stream=fxmem.Stream(), blocks=replace(base, **changes))


def build(name: str, model: Any, base: fxmem.Blocks, rates: Rates) -> Training:
    """Prepare ``model`` in place; ``base`` holds partition and schedule of the block methods."""
    if name.startswith("adamw"):
        if name == "adamw+checkpoint":
            enable_checkpointing(model)
        return _plain(model, model.parameters(), rates.adam)
    if name == "badam":
        return _badam(model, base, rates.block)
    if name == "lora":
        return _lora(model, rates.low_rank)
    fxmem.transform(model, plan(name, base, rates))
    optimizer = fxmem.BlockAdamW(model, lr=rates.block, betas=BETAS, weight_decay=DECAY)
    state = state_of(model)
    terms = [p for a in state.adapters.values() for p in (a.up, a.down)]
    return Training(model, optimizer, len(state.blocks), lambda: _tensors(optimizer), tuple(terms))


def _plain(model: Any, parameters: Iterator[nn.Parameter], lr: float) -> Training:
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=BETAS, weight_decay=DECAY)
    return Training(model, optimizer, state=lambda: _tensors(optimizer))


def _badam(model: Any, base: fxmem.Blocks, lr: float) -> Training:
    from badam import BlockOptimizer

    if base.layers_per_block != 1:
        raise ValueError("badam has one layer per block")
    enable_checkpointing(model)
    # it switches a step early the first time, and says so at length
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inner = torch.optim.AdamW(model.parameters(), lr=lr, betas=BETAS, weight_decay=DECAY)
        start = base.start if base.order == "fixed" else None
        optimizer = BlockOptimizer(
            inner, list(model.named_parameters()), switch_block_every=base.steps,
            switch_mode=base.order, start_block=start, verbose=0,
        )  # fmt: skip

    def state() -> list[Tensor]:
        return [*_tensors(inner), *optimizer.param_idx2hp.values()]

    return Training(model, optimizer, optimizer.block_num, state)


def _lora(model: Any, lr: float) -> Training:
    from peft import LoraConfig, get_peft_model

    enable_checkpointing(model)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    terms = [p for p in model.parameters() if p.requires_grad]
    training = _plain(model, iter(terms), lr)
    training.terms = tuple(terms)
    return training


def _tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    entries = optimizer.state.values()
    return [v for entry in entries for v in entry.values() if isinstance(v, Tensor) and v.dim()]


@contextmanager
def merged(model: Any) -> Iterator[None]:
    """Add fxmem's low-rank terms, which an evaluation does not see, to their weights meanwhile."""
    try:
        adapters = state_of(model).adapters
    except fxmem.FxmemError:
        adapters = {}
    weights = dict(model.named_parameters()) if adapters else {}
    before = {name: weights[name].detach().clone() for name in adapters}
    with torch.no_grad():
        for name, a in adapters.items():
            weights[name].add_(a.up @ a.down, alpha=a.scale)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                weights[name].copy_(value)


@torch.no_grad()
def evaluate(model: Any, rows_BT: Tensor) -> float:
    """Mean loss per predicted token, without dropout."""
    model.eval()
    with merged(model):
        losses = [
            float(model(input_ids=row[None], labels=row[None], use_cache=False).loss)
            for row in rows_BT
        ]
    model.train()
    return sum(losses) / len(losses)
