"""A small convolutional network, trained on scikit-learn's digits, at half of its multiply-adds.

    python -m benchmarks.digits --seeds 5

Beside torch-pruning at equal multiply-adds, counted by the same code. Accuracy on images that
nothing has seen: as pruned, and after the same short training for all.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmem

FOLDER = Path(__file__).parent / "results"


def block(ins: int, outs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(ins, outs, 3, padding=1, bias=False), nn.BatchNorm2d(outs), nn.ReLU()
    )


class Digits(nn.Module):
    """Two stages, each with a residual block; with labels it returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.widen = block(1, 32), block(32, 64)
        self.first = nn.Sequential(block(32, 32), block(32, 32))
        self.second = nn.Sequential(block(64, 64), block(64, 64))
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.stem(images)
        x = self.widen(F.max_pool2d(x + self.first(x), 2))
        logits: Tensor = self.head((x + self.second(x)).mean((2, 3)))
        return logits if labels is None else F.cross_entropy(logits, labels)


def data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1,000 images to learn from and 797 to test on, with labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    learn, test = order[:1000], order[1000:]
    return images[learn], labels[learn], images[test], labels[test]


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float) -> None:
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * 10)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return 100 * float((model.eval()(images).argmax(1) == labels).float().mean())


@torch.no_grad()
def multiply_adds(model: nn.Module) -> int:
    """Of convolutions and matrices, for one image."""
    total = 0

    def count(module: Any, args: Any, out: Tensor) -> None:
        nonlocal total
        total += out[0].numel() * module.weight[0].numel()

    kinds = (nn.Conv2d, nn.Linear)
    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, kinds)]
    model.eval()(torch.zeros(1, 1, 8, 8))
    for handle in handles:
        handle.remove()
    return total


def at_budget(make: Callable[[float], nn.Module], budget: float) -> nn.Module:
    """The largest of the models that `make` gives for a fraction within the budget."""
    low, high, best = 0.05, 1.0, None
    for _ in range(7):
        middle = (low + high) / 2
        model = make(middle)
        if multiply_adds(model) <= budget:
            low, best = middle, model
        else:
            high = middle
    assert best is not None
    return best


def by_fxmem(model: nn.Module, images: Tensor, labels: Tensor, search: bool) -> Any:
    rows = torch.randperm(len(labels)).split(100)
    batches = [{"images": images[r], "labels": labels[r]} for r in rows]
    coupled = fxmem.coupling(model, images[:2])
    values, _ = fxmem.score(model, batches, "taylor", fxmem.Prune(), coupled=coupled)

    def make(keep: float) -> nn.Module:
        if search:
            how = fxmem.Prune(keep=keep, steps=40)
            masks = fxmem.search(model, batches, how, coupled=coupled, importance=values)
        else:
            how = fxmem.Prune(keep=keep)
            _, masks = fxmem.score(model, batches, "taylor", how, coupled=coupled)
        return fxmem.materialize(model, masks, coupled)

    return make


def by_torch_pruning(model: nn.Module, images: Tensor, labels: Tensor, taylor: bool) -> Any:
    import torch_pruning as tp

    def make(keep: float) -> nn.Module:
        small: Any = copy.deepcopy(model)
        importance = tp.importance.GroupTaylorImportance if taylor else (
            tp.importance.GroupMagnitudeImportance
        )  # fmt: skip
        pruner = tp.pruner.BasePruner(
            small, images[:2], importance(), pruning_ratio=1 - keep, global_pruning=True,
            ignored_layers=[small.head], max_pruning_ratio=0.9,
        )  # fmt: skip
        if taylor:
            F.cross_entropy(small(images), labels).backward()
        pruner.step()
        small.zero_grad()
        return small  # type: ignore[no-any-return]

    return make


METHODS: dict[str, Any] = {
    "torch-pruning, magnitude": lambda *a: by_torch_pruning(*a, taylor=False),
    "torch-pruning, Taylor": lambda *a: by_torch_pruning(*a, taylor=True),
    "fxmem, Taylor": lambda *a: by_fxmem(*a, search=False),
    "fxmem, search by gates": lambda *a: by_fxmem(*a, search=True),
}


def run(seed: int) -> dict[str, tuple[float, ...]]:
    """Per method accuracy as pruned, accuracy after training, and the part of multiply-adds."""
    torch.manual_seed(seed)
    images, labels, test, wanted = data(seed)
    model = Digits()
    train(model, images, labels, 15, 5e-3)
    whole, dense = multiply_adds(model), accuracy(model, test, wanted)
    found: dict[str, tuple[float, ...]] = {"dense": (dense, dense, 1.0)}
    for name, method in METHODS.items():
        torch.manual_seed(seed)
        small = at_budget(method(model, images, labels), whole / 2)
        before = accuracy(small, test, wanted)
        torch.manual_seed(seed)
        train(small, images, labels, 3, 1e-3)
        found[name] = (before, accuracy(small, test, wanted), multiply_adds(small) / whole)
        print(seed, name, found[name], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    runs = [run(seed) for seed in range(options.seeds)]
    lines = ["| | as pruned | after 3 epochs | multiply-adds |", "|---|---:|---:|---:|"]
    for name in runs[0]:
        pruned, trained, part = ([r[name][i] for r in runs] for i in range(3))
        lines.append(
            f"| {name} | {_spread(pruned)} | {_spread(trained)} | {statistics.mean(part):.2f} |"
        )
    print("\n".join(lines))
    (FOLDER / "digits.json").write_text(json.dumps(runs, indent=1) + "\n")


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    main()
