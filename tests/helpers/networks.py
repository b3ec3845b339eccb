"""Small networks that are no language models, for pruning: every kind of coupling."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def block(ins: int, outs: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(ins, outs, 3, stride, 1, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outs), nn.ReLU())


class Residual(nn.Module):
    """Two convolutions beside a projection, as in ResNet; groups as in ResNeXt."""

    def __init__(self, ins: int, outs: int, groups: int = 1) -> None:
        super().__init__()
        self.first = block(ins, outs, 2)
        self.second = nn.Sequential(
            nn.Conv2d(outs, outs, 3, 1, 1, groups=groups), nn.BatchNorm2d(outs)
        )
        self.beside = nn.Sequential(nn.Conv2d(ins, outs, 1, 2), nn.BatchNorm2d(outs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.beside(x))


class ResNet(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.stem = block(3, 8)
        self.blocks = nn.Sequential(Residual(8, 12, groups), Residual(12, 16, groups))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.max_pool2d(self.stem(x), 2)).mean((2, 3)))


class Inverted(nn.Module):
    """Expansion, depthwise convolution, squeeze and excitation, projection, as in MobileNet."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.wide, self.deep = block(width, inner), block(inner, inner, groups=inner)
        self.squeeze, self.excite = nn.Conv2d(inner, 4, 1), nn.Conv2d(4, inner, 1)
        self.narrow = nn.Sequential(nn.Conv2d(inner, width, 1), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.deep(self.wide(x))
        gate = self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(h, 1))))
        return x + self.narrow(h * F.hardsigmoid(gate))


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 8, 2)
        self.blocks = nn.Sequential(Inverted(8, 12), Inverted(8, 16))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 16, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


class Modern(nn.Module):
    """Depthwise convolution, LayerNorm over channels, MLP, a small scale, as in ConvNeXt."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.deep = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.deep(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.down(F.gelu(self.up(h)))).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.blocks = nn.Sequential(Modern(8), Modern(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class UNet(nn.Module):
    """Down and up with concatenation; one step up by a transposed convolution, one by resizing."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = block(3, 6), block(6, 8, 2), block(8, 10, 2)
        self.up = nn.ConvTranspose2d(10, 7, 2, 2)
        self.four, self.five = block(7 + 8, 9), block(9 + 6, 6)
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.one(x)
        b = self.two(a)
        c = torch.cat([self.up(self.three(b)), b], 1)
        d = F.interpolate(self.four(c), scale_factor=2.0)
        return self.out(self.five(torch.cat([d, a], 1)))


class Grouped(nn.Module):
    """GroupNorm, whose groups go whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 12, 3), nn.GroupNorm(4, 12)
        self.second = nn.Conv2d(12, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.norm(self.first(x))))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10), nn.Tanh(),
        nn.Linear(10, 3),
    )  # fmt: skip


IMAGE = (2, 3, 8, 8)
NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "mlp": (mlp, (7, 6)),
    "resnet": (ResNet, IMAGE),
    "resnext": (lambda: ResNet(2), IMAGE),
    "mobilenet": (MobileNet, IMAGE),
    "convnext": (ConvNeXt, IMAGE),
    "unet": (UNet, IMAGE),
    "group norm": (Grouped, IMAGE),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A network in float64, evaluation mode, with statistics as after training; and an input."""
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model: nn.Module = make().double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.normal_()  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
                module.weight.normal_(1, 0.3)
                module.bias.normal_()
    return model, torch.randn(shape, dtype=torch.float64)
