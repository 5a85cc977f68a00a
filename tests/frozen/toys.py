"""A small frame around a body under test, for programs whose every node can be accounted for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

CHANNELS = 8


class Framed(nn.Module):
    """A stem, the body ``[B, 8, H, W]`` to the same, a mean over places and a classifier."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.body = body
        self.fc = nn.Linear(CHANNELS, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self.stem(x)).mean((2, 3)))


class Block(nn.Module):
    """Some modules and parameters, and the function that is its forward."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def framed(function: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> Framed:
    """A block in its frame."""
    return Framed(Block(function, **parts))


def conv(kernel: int = 3, inputs: int = CHANNELS, outputs: int = CHANNELS, **options: int | bool) -> nn.Conv2d:
    """A conv that keeps the size."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)  # type: ignore[arg-type]


def vector(*shape: int) -> nn.Parameter:
    """Numbers from 0.5 to 1.5."""
    return nn.Parameter(torch.rand(*shape) + 0.5)
