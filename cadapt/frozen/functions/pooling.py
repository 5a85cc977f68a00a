"""Pooling that keeps no map for backward.

An average hands the same share of its gradient to every place of its window, wherever the numbers were: torch keeps the
input all the same, only to ask for its shape. A maximum hands all of it to one place: torch keeps the input and a
64-bit index, where the place within the window, one byte, says it all.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from cadapt.frozen.functions.bits import flat
from cadapt.frozen.functions.conv import Pair, layout_of

Size = int | tuple[int, ...]


def avg_pool2d_lean(
    x: Tensor,
    kernel: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """`F.avg_pool2d`, keeping nothing.

    Args:
        x: [B, C, H, W], in any memory format; its gradient comes in the same format.
        kernel: The window's height and width, or one number for both; so the following.
        stride: Steps down and across; the kernel's where it is None.
        padding: Zeros added at either side.
        ceil_mode: Whether windows may reach beyond the border.
        count_include_pad: Whether added zeros count as places of the window.

    Returns:
        [B, C, H', W'].
    """
    window = (pair(kernel), pair(stride or kernel), pair(padding))
    y: Tensor = _AvgPool.apply(x, window, ceil_mode, count_include_pad)
    return y


def max_pool2d_lean(
    x: Tensor,
    kernel: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """`F.max_pool2d`, keeping one byte per element of the result: the place in its window.

    Windows of more than 256 places, or wider than the map, are left to torch.

    Args:
        x: [B, C, H, W], in any memory format; its gradient comes in the same format.
        kernel: The window's height and width, or one number for both; so the following.
        stride: Steps down and across; the kernel's where it is None.
        padding: Places at either side that hold −∞.
        dilation: Distances between the window's places.
        ceil_mode: Whether windows may reach beyond the border.

    Returns:
        [B, C, H', W'].
    """
    window = (pair(kernel), pair(stride or kernel), pair(padding), pair(dilation))
    (height, width), _, _, (_, across) = window
    # a window wider than the map has several places of one offset
    plain = height * width > 256 or (width - 1) * across >= x.shape[3]
    if plain or not (torch.is_grad_enabled() and x.requires_grad):
        return F.max_pool2d(x, *window, ceil_mode)
    y: Tensor = _MaxPool.apply(x, window, ceil_mode)
    return y


def global_avg_pool2d_lean(x: Tensor) -> Tensor:
    """`F.adaptive_avg_pool2d(x, 1)`: [B, C, H, W] → [B, C, 1, 1], keeping nothing."""
    return x.mean((2, 3), keepdim=True)


def pair(size: Size) -> Pair:
    """One number for both sides, or two."""
    if isinstance(size, int):
        return size, size
    return (size[0], size[0]) if len(size) == 1 else (size[0], size[1])


class _AvgPool(Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, window: tuple[Pair, Pair, Pair], ceil_mode: bool, count_include_pad: bool
    ) -> Tensor:
        ctx.settings = (*window, ceil_mode, count_include_pad, None)
        ctx.layout = layout_of(x)
        return F.avg_pool2d(x, *window, ceil_mode, count_include_pad)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # only the shape and the memory format of this tensor are read
        absent = grad.new_empty_strided(*ctx.layout)
        return torch.ops.aten.avg_pool2d_backward(grad, absent, *ctx.settings), None, None, None


class _MaxPool(Function):
    """Index = that of the window's first place + the offset of the maximum's place within the window."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, window: tuple[Pair, Pair, Pair, Pair], ceil_mode: bool
    ) -> Tensor:
        y, index = torch.ops.aten.max_pool2d_with_indices(x, *window, ceil_mode)
        offsets = _offsets(window, x)
        places = torch.zeros(_reach(window, x) + 1, dtype=torch.uint8, device=x.device)
        places[offsets] = torch.arange(offsets.numel(), dtype=torch.uint8, device=x.device)
        ctx.save_for_backward(_look_up(places, index.sub_(_corners(index, window, x.shape[3]))))
        ctx.settings, ctx.layout = (window, ceil_mode), layout_of(x)
        result: Tensor = y
        return result

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (place,) = ctx.saved_tensors
        window, ceil_mode = ctx.settings
        absent = grad.new_empty_strided(*ctx.layout)
        index = _look_up(_offsets(window, absent), place.int()).add_(_corners(place, window, absent.shape[3]))
        x_grad = torch.ops.aten.max_pool2d_with_indices_backward(grad, absent, *window, ceil_mode, index)
        return x_grad, None, None


def _offsets(window: tuple[Pair, Pair, Pair, Pair], x: Tensor) -> Tensor:
    """Of each place of a window, how far behind the first one it lies in a map: [height · width], ascending."""
    (height, width), _, _, (down, across) = window
    rows = torch.arange(height, device=x.device)[:, None] * (down * x.shape[3])
    return (rows + torch.arange(width, device=x.device) * across).flatten()


def _reach(window: tuple[Pair, Pair, Pair, Pair], x: Tensor) -> int:
    """The largest of these offsets."""
    (height, width), _, _, (down, across) = window
    return (height - 1) * down * x.shape[3] + (width - 1) * across


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """``table[index]`` in the index's memory format; in the order of memory, which is faster than by dimensions."""
    return table.index_select(0, flat(index)).as_strided(index.shape, index.stride())


def _corners(result: Tensor, window: tuple[Pair, Pair, Pair, Pair], width: int) -> Tensor:
    """The index in the map of each window's first place [H', W'], as if what is padded lay in memory, too."""
    _, stride, padding, _ = window
    rows = torch.arange(result.shape[2], device=result.device)[:, None] * stride[0] - padding[0]
    columns = torch.arange(result.shape[3], device=result.device) * stride[1] - padding[1]
    return rows * width + columns
