"""Convolutions of a traced model, whatever their class: plain, weight-standardised, same-padded, conditional."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import fx, nn

from cadapt.graph.operators import module_of
from cadapt.site import PaddingMode, Pair


@dataclass(frozen=True, kw_only=True)
class Conv:
    """The geometry of one two-dimensional convolution; ``padding`` is ``"same"`` where it pads at run time.

    ``padding_mode`` is what it pads with, by torch's name.
    """

    kernel: Pair
    stride: Pair
    padding: Pair | Literal["same"]
    dilation: Pair
    groups: int
    padding_mode: PaddingMode = "zeros"

    @property
    def is_wide(self) -> bool:
        """Whether it sees more than one place of its input."""
        return max(self.kernel) > 1


def pair(value: Any) -> Pair:
    """A module's setting for height and width, given as one number or two."""
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def is_conv(module: nn.Module) -> bool:
    """Whether a module is a two-dimensional convolution: by its class, or by having its settings and a weight."""
    if isinstance(module, nn.Conv2d):
        return True
    settings = ("kernel_size", "stride", "padding", "dilation", "groups")
    if not all(hasattr(module, name) for name in settings) or _sides(module) != 2:
        return False
    # asked last: while a model is traced, to ask a module for a parameter leaves a node in the graph
    return isinstance(getattr(module, "weight", None), nn.Parameter)


def _sides(module: nn.Module) -> int:
    size = module.kernel_size
    return len(size) if isinstance(size, tuple) else 2


def read_conv(module: nn.Module) -> Conv:
    """The geometry of a convolution module."""
    settings: Any = module
    same = (
        isinstance(settings.padding, str)
        or "Same" in type(module).__name__
        or getattr(module, "dynamic_padding", False) is True
        or getattr(module, "same_pad", False) is True
    )
    return Conv(
        kernel=pair(settings.kernel_size),
        stride=pair(settings.stride),
        padding="same" if same else pair(settings.padding),
        dilation=pair(settings.dilation),
        groups=int(settings.groups),
        padding_mode=_mode_of(module),
    )


def _mode_of(module: nn.Module) -> PaddingMode:
    """What a conv pads with; timm's convs that pad or standardise by themselves do not look at torch's setting."""
    if not isinstance(module, nn.Conv2d) or type(module).forward is not nn.Conv2d.forward:
        return "zeros"
    mode: PaddingMode = module.padding_mode
    return mode


def conv_of(node: fx.Node, model: nn.Module) -> Conv | None:
    """The convolution a node calls, or None where it calls something else."""
    module = module_of(node, model)
    return read_conv(module) if module is not None and is_conv(module) else None


def fit_axis(size: int, out_size: int, kernel: int, dilation: int) -> tuple[int, int] | None:
    """Stride and padding on both sides with which a kernel takes one size to another, the widest padding first."""
    ratio = size / out_size
    strides = dict.fromkeys((round(ratio), math.floor(ratio), math.ceil(ratio)))
    for padding in range(dilation * (kernel // 2), -1, -1):
        for stride in strides:
            if stride > 0 and (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 == out_size:
                return stride, padding
    return None


def fit_grid(conv: Conv, grid: Pair, out_grid: Pair) -> Conv:
    """A square conv like one of several layers, with the stride and padding that take one grid to another.

    TensorFlow's rule stays where the conv pads by it. Where nothing fits, the stride is the ratio of the sizes.
    """
    side = max(conv.kernel)
    found = [fit_axis(grid[axis], out_grid[axis], side, conv.dilation[axis]) for axis in (0, 1)]
    rows, columns = (
        fit or (max(1, round(grid[axis] / out_grid[axis])), conv.dilation[axis] * (side // 2))
        for axis, fit in enumerate(found)
    )
    stride = (rows[0], columns[0])
    same = conv.padding == "same" and max(stride) > 1
    return replace(conv, kernel=(side, side), stride=stride, padding="same" if same else (rows[1], columns[1]))


def widest(convs: list[Conv]) -> Conv:
    """The conv with the largest kernel; a square one goes before a band, which sees one axis only."""
    square = [conv for conv in convs if conv.kernel[0] == conv.kernel[1] > 1]
    return max(square or convs, key=lambda conv: max(conv.kernel))
