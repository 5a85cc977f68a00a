"""ReLU and its bounded kin, which keep one bit per element for backward.

The gradient of max(x, 0) is the output's gradient where x > 0 and zero elsewhere: to know where that is, torch keeps
all of the result, 32 times what is needed in float32. Where something else keeps the result anyway, `relu_result`
shares it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from cadapt.frozen.functions.bits import inside_bits, is_dense, masked_gradient, positive_bits


def relu_bits(x: Tensor, inplace: bool = False) -> Tensor:
    """max(x, 0), keeping one bit per element.

    Args:
        x: Any shape, any floating dtype, any memory order.
        inplace: Write the result over x.

    Returns:
        x's shape, dtype and strides.
    """
    return hardtanh_bits(x, 0.0, float("inf"), inplace)


def relu6_bits(x: Tensor, inplace: bool = False) -> Tensor:
    """min(max(x, 0), 6), keeping one bit per element; arguments as in `relu_bits`."""
    return hardtanh_bits(x, 0.0, 6.0, inplace)


def hardtanh_bits(x: Tensor, low: float = -1.0, high: float = 1.0, inplace: bool = False) -> Tensor:
    """min(max(x, low), high), keeping one bit per element; arguments as in `relu_bits`."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _clamp(x, low, high, inplace)
    # a compiler removes copies by itself, and traces no function that writes over its input
    result: Tensor = _ClampBits.apply(x, low, high, inplace and not torch.compiler.is_compiling())
    return result


def relu_result(x: Tensor, inplace: bool = False) -> Tensor:
    """max(x, 0) as torch does it: keeps the result, at no cost where something else keeps that anyway."""
    return F.relu(x, inplace)


def _clamp(x: Tensor, low: float, high: float, inplace: bool) -> Tensor:
    if low == 0.0 and high == float("inf"):
        return F.relu(x, inplace)
    return F.hardtanh(x, low, high, inplace)


class _ClampBits(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float, inplace: bool) -> Tensor:  # type: ignore[override]
        dense = x if is_dense(x) else x.contiguous()
        bounded = high != float("inf")
        ctx.save_for_backward(inside_bits(dense, low, high) if bounded else positive_bits(dense))
        ctx.strides = dense.stride()
        if inplace:
            ctx.mark_dirty(x)
        return _clamp(x, low, high, inplace)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (bits,) = ctx.saved_tensors
        return masked_gradient(grad, bits, ctx.strides), None, None, None
