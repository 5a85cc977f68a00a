"""Convolutions of a frozen backbone: the gradient goes through them, the input is not kept.

With y = w * x + b, the gradient for the input is the transposed convolution of the output's gradient, and the bias's is
its sum over pictures and places: neither needs x. Only the weight's does; where a weight is trained, `conv2d_through`
recomputes the input from the tensor that it was made of, which something else keeps anyway.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from cadapt.frozen.functions.casting import autocast_dtype, cast, cast_bias, cast_with_source
from cadapt.frozen.functions.products import takes_onednn

Pair = tuple[int, int]
Geometry = tuple[Pair, Pair, Pair, int]
"""Stride, padding, dilation, groups."""


def frozen_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Tensor:
    """`F.conv2d` with a weight that needs no gradient: keeps the weight, and nothing of the input.

    Args:
        x: [B, C, H, W], in any memory format; its gradient comes in the same format.
        weight: [D, C / groups, kernel, kernel], frozen.
        bias: [D], frozen or trained, or None.
        stride: Steps down and across.
        padding: Zeros added at either side, down and across.
        dilation: Distances between the kernel's places, down and across.
        groups: Into how many parts the channels are cut.

    Returns:
        [B, D, H', W'], in autocast's dtype where that is on.
    """
    dtype = autocast_dtype(x.device)
    x, weight, bias = cast(x, dtype), cast(weight.detach(), dtype), cast_bias(bias, dtype)
    y: Tensor = _FrozenConv.apply(x, weight, bias, (stride, padding, dilation, groups))
    return y


def conv2d_through(
    y: Tensor,
    source: Tensor,
    recompute: Callable[[Tensor], Tensor],
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    """`F.conv2d(y, weight, bias, …)` that keeps what y was made of in y's place.

    Args:
        y: [B, C, H, W], equal to ``recompute(source)``; gradients reach it as usual.
        source: The tensor to keep; no gradient goes to it from here.
        recompute: A pure function, called once more in backward where the weight needs a gradient.
        weight: [D, C / groups, kernel, kernel], frozen or trained.
        bias: [D] or None, frozen or trained.
        stride: As in `frozen_conv2d`.
        padding: As in `frozen_conv2d`.
        dilation: As in `frozen_conv2d`.
        groups: As in `frozen_conv2d`.

    Returns:
        [B, D, H', W'], in autocast's dtype where that is on.
    """
    if not weight.requires_grad:
        return frozen_conv2d(y, weight, bias, stride, padding, dilation, groups)
    dtype = autocast_dtype(y.device)
    y, source = cast_with_source(y, source, dtype)
    weight, bias = cast(weight, dtype), cast_bias(bias, dtype)
    geometry = (stride, padding, dilation, groups)
    result: Tensor = _ConvThrough.apply(y, source.detach(), recompute, weight, bias, geometry)
    return result


class _FrozenConv(Function):
    """Keeps the weight; of the input only its shape and strides."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.geometry, ctx.layout = geometry, layout_of(x)
        return convolve(x, weight, bias, geometry)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        for_x, _, for_bias, _ = ctx.needs_input_grad
        x_grad = input_gradient(grad, weight, ctx.layout, ctx.geometry) if for_x else None
        return x_grad, None, grad.sum((0, 2, 3)) if for_bias else None, None


class _ConvThrough(Function):
    """Keeps the weight and the input's source."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        y: Tensor,
        source: Tensor,
        recompute: Callable[[Tensor], Tensor],
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
    ) -> Tensor:
        ctx.save_for_backward(source, weight)
        ctx.recompute, ctx.geometry, ctx.layout = recompute, geometry, layout_of(y)
        return convolve(y, weight, bias, geometry)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        source, weight = ctx.saved_tensors
        geometry = ctx.geometry
        for_y, _, _, for_weight, for_bias, _ = ctx.needs_input_grad
        weight_grad = None
        if for_weight:
            y = ctx.recompute(source).to(weight.dtype)
            weight_grad = weight_gradient(grad, y, weight, geometry)
            del y
        y_grad = input_gradient(grad, weight, ctx.layout, geometry) if for_y else None
        return y_grad, None, None, weight_grad, grad.sum((0, 2, 3)) if for_bias else None, None


def layout_of(x: Tensor) -> tuple[torch.Size, tuple[int, ...]]:
    """A tensor's shape, and strides by which a fresh one of the same memory format is laid out."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x.shape, x.stride()
    batch, channels, height, width = x.shape
    if x.stride(1) == 1:
        return x.shape, (height * width * channels, 1, width * channels, channels)
    return x.shape, (channels * height * width, height * width, width, 1)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The convolution itself, by oneDNN where torch would pick a slower matrix product."""
    stride, padding, dilation, groups = geometry
    if _is_pointwise(x, weight, geometry):
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, dilation, groups)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def input_gradient(
    grad: Tensor, weight: Tensor, layout: tuple[torch.Size, tuple[int, ...]], geometry: Geometry
) -> Tensor:
    """The gradient for an input that is no longer there: [B, C, H, W] in the layout it had."""
    stride, padding, dilation, groups = geometry
    if _is_pointwise(grad, weight, geometry):
        grad = _dense(grad, layout)
        return torch.mkldnn_convolution(grad, weight.transpose(0, 1), None, padding, stride, dilation, groups)
    # only the shape and the memory format of this tensor are read
    absent = grad.new_empty_strided(*layout)
    needed = [True, False, False]
    result: Tensor = torch.ops.aten.convolution_backward(
        grad, absent, weight, None, stride, padding, dilation, False, (0, 0), groups, needed
    )[0]
    return result


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The gradient for a weight: [D, C / groups, kernel, kernel]."""
    stride, padding, dilation, groups = geometry
    if _is_pointwise(x, weight, geometry) and x.is_contiguous(memory_format=torch.channels_last):
        # places of a 1×1 conv may be regrouped at will; torch hands 16 pictures or more to oneDNN
        grad, x = _rows_as_pictures(grad), _rows_as_pictures(x)
    needed = [False, True, False]
    result: Tensor = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, (0, 0), groups, needed
    )[1]
    return result


def _is_pointwise(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether this is a 1×1 conv that torch, on one thread and below 16 pictures, takes from oneDNN's hands.

    The matrix product that it uses instead is half as fast where MKL does not know the processor.
    """
    return geometry == ((1, 1), (0, 0), (1, 1), 1) and weight.shape[2:] == (1, 1) and takes_onednn(x)


def _dense(grad: Tensor, layout: tuple[torch.Size, tuple[int, ...]]) -> Tensor:
    """A gradient in the memory format that its input had: sums and means hand on expanded ones."""
    shape, strides = layout
    channels_last = strides[1] == 1 and shape[1] > 1
    return grad.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _rows_as_pictures(x: Tensor) -> Tensor:
    """[B, C, H, W] in channels_last as [B · H, C, 1, W]."""
    batch, channels, height, width = x.shape
    return x.permute(0, 2, 3, 1).reshape(batch * height, 1, width, channels).permute(0, 3, 1, 2)
