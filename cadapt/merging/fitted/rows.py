"""What a layer multiplies its weight with, as rows of a regression: im2col, at a sample of the output's places.

A convolution's row is its input under the kernel, channel by channel in the order of the weight; a linear layer's row
is its input. Rows are drawn by a generator, the same number from each picture, since neighbours in one say the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Conv2dSame
from timm.layers.padding import pad_same
from torch import nn
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class Places:
    """Some places of an output: which picture ``[N]``, and where on its grid, ``[N]`` for each of its axes."""

    picture: torch.Tensor
    where: tuple[torch.Tensor, ...]


def draw_places(shape: tuple[int, ...], per_picture: int, generator: torch.Generator) -> Places:
    """Draw places of an output of ``shape`` ``[B, *grid]``, at most ``per_picture`` from each picture."""
    pictures, grid = shape[0], shape[1:]
    cells = 1
    for side in grid:
        cells *= side
    number = min(per_picture, cells)
    flat = torch.stack([torch.randperm(cells, generator=generator)[:number] for _ in range(pictures)]).flatten()
    picture = torch.arange(pictures).repeat_interleave(number)
    where = []
    for side in reversed(grid):
        where.append(flat % side)
        flat = flat // side
    return Places(picture=picture, where=tuple(reversed(where)))


def grid_of(output: torch.Tensor, *, channels_first: bool) -> tuple[int, ...]:
    """The batch and the grid of an output, without its channels."""
    return (output.shape[0], *output.shape[2:]) if channels_first else tuple(output.shape[:-1])


def pick(values: torch.Tensor, places: Places, *, channels_first: bool) -> torch.Tensor:
    """The channels of a tensor at some places, ``[N, C]``."""
    last = values.movedim(1, -1) if channels_first else values
    return last[(places.picture, *places.where)]


def rows_of(layer: nn.Module, source: torch.Tensor, places: Places) -> torch.Tensor:
    """What a layer reads for some places of its output: ``[groups, N, D]``, D in the order of the weight's own.

    Args:
        layer: a plain convolution or a linear layer.
        source: its input, ``[B, C, H, W]`` or ``[B, …, C]``.
        places: of its output.
    """
    if isinstance(layer, nn.Linear):
        return source[(places.picture, *places.where)][None]
    conv: Any = layer
    padded = _padded(conv, source)
    rows = _under(padded, places, conv)
    number = len(places.picture)
    return rows.reshape(number, conv.groups, -1).transpose(0, 1)


def _padded(conv: nn.Conv2d, source: torch.Tensor) -> torch.Tensor:
    if isinstance(conv, Conv2dSame):
        padded: torch.Tensor = pad_same(source, conv.kernel_size, conv.stride, conv.dilation)
        return padded
    assert not isinstance(conv.padding, str), conv
    rows, columns = conv.padding
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return functional.pad(source, (columns, columns, rows, rows), mode=mode)


def _under(padded: torch.Tensor, places: Places, conv: nn.Conv2d) -> torch.Tensor:
    """The input under the kernel, ``[N, C, K, L]``."""
    ends = []
    for axis, where in enumerate(places.where):
        taps = torch.arange(conv.kernel_size[axis]) * conv.dilation[axis]
        ends.append(where[:, None] * conv.stride[axis] + taps[None])
    rows, columns = ends
    last = padded.movedim(1, -1)
    found = last[places.picture[:, None, None], rows[:, :, None], columns[:, None, :]]
    return found.movedim(-1, 1)
