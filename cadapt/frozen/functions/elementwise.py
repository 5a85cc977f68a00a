"""Element-wise operations that keep at most one tensor for backward, and the table of those that can be redone at will.

Torch's own kernels of SiLU, GELU and their kin keep their input and nothing else, so they stay; activations that are
written as several operations keep a tensor for each of them, and are one function here. A frozen affine, y = a x + b,
has the gradient a G and keeps no map at all. Of a product y · g with a gate, y can be redone from what it was made of.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from cadapt.frozen.functions.relu import relu6_bits, relu_bits

Recompute = Callable[[Tensor], Tensor]


def affine(x: Tensor, scale: Tensor, shift: Tensor, channel_dim: int = 1) -> Tensor:
    """scale ⊙ x + shift along one dimension, both frozen: keeps the scale, and nothing of the input.

    Args:
        x: Any shape with C entries along ``channel_dim``.
        scale: [C], frozen. In half precision the arithmetic is that of float32, as in torch's batch norm.
        shift: [C], frozen.
        channel_dim: Which dimension of x the channels are.

    Returns:
        x's shape and dtype.
    """
    dtype = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    y: Tensor = _Affine.apply(x, scale.detach().to(dtype), shift.detach().to(dtype), channel_dim % x.dim())
    return y


def mul_through(y: Tensor, gate: Tensor, source: Tensor, recompute: Recompute) -> Tensor:
    """y ⊙ gate that keeps the gate and what y was made of, in y's place.

    Args:
        y: [B, C, H, W], or any shape; equal to ``recompute(source)``. Gradients reach it as usual.
        gate: A shape that broadcasts to y's, as [B, C, 1, 1] does in squeeze-and-excitation.
        source: The tensor to keep; no gradient goes to it from here.
        recompute: A pure function, called once more in backward where the gate needs a gradient.

    Returns:
        y's shape.
    """
    result: Tensor = _MulThrough.apply(y, gate, source.detach(), recompute)
    return result


def activation(name: str, x: Tensor, inplace: bool = False) -> Tensor:
    """An activation by its name in `RECOMPUTABLE`: keeps x alone, or less.

    ReLU and ReLU6 keep one bit per element, and only these compute in place when asked to; sigmoid and tanh keep their
    result.
    """
    if name == "relu":
        return relu_bits(x, inplace)
    if name == "relu6":
        return relu6_bits(x, inplace)
    result: Tensor = _COMPOSITE[name].apply(x) if name in _COMPOSITE else RECOMPUTABLE[name](x)
    return result


class _Affine(Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, channel_dim: int
    ) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.channel_dim = channel_dim
        return _scale(x, scale, shift, channel_dim)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (scale,) = ctx.saved_tensors
        return _scale(grad, scale, None, ctx.channel_dim), None, None, None


def _scale(x: Tensor, scale: Tensor, shift: Tensor | None, channel_dim: int) -> Tensor:
    if x.dtype != scale.dtype and channel_dim == 1:
        # an inference-mode batch norm is one pass that reads half precision and computes in float32
        zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
        return F.batch_norm(x, zeros, ones, scale, shift, training=False, eps=0.0)
    shape = [-1] + [1] * (x.dim() - 1 - channel_dim)
    scale = scale.view(shape)
    if shift is None:
        return (x * scale).to(x.dtype)
    if x.dtype == scale.dtype and x.stride(channel_dim) == 1:
        return torch.addcmul(shift.view(shape), x, scale)
    return (x * scale).add_(shift.view(shape)).to(x.dtype)


class _MulThrough(Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, y: Tensor, gate: Tensor, source: Tensor, recompute: Recompute
    ) -> Tensor:
        # the source is of use for nothing but the gate's gradient
        ctx.save_for_backward(gate, source if ctx.needs_input_grad[1] else None)
        ctx.recompute, ctx.y_dtype = recompute, y.dtype
        return y * gate

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gate, source = ctx.saved_tensors
        for_y, for_gate = ctx.needs_input_grad[:2]
        gate_grad = None
        if for_gate:
            y = ctx.recompute(source).to(ctx.y_dtype)
            gate_grad = (grad * y).sum_to_size(gate.shape).to(gate.dtype)
            del y
        y_grad = (grad * gate).to(ctx.y_dtype) if for_y else None
        return y_grad, gate_grad, None, None


_QUICK = 1.702


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(_QUICK * x)


def _hard_mish(x: Tensor) -> Tensor:
    return 0.5 * x * (x + 2).clamp(0, 2)


class _QuickGELU(Function):
    """x σ(a x) = silu(a x) / a, so that its gradient is silu's at a x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return _quick_gelu(x)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        result: Tensor = torch.ops.aten.silu_backward(grad, x * _QUICK)
        return result


class _HardMish(Function):
    """x min(max(x + 2, 0), 2) / 2: its slope is x + 1 where −2 < x < 0, 0 below and 1 above."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return _hard_mish(x)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        slope: Tensor = (x + 1).clamp(max=1).masked_fill(x <= -2, 0)
        return grad * slope


_COMPOSITE: Mapping[str, type[Function]] = MappingProxyType({"quick_gelu": _QuickGELU, "hard_mish": _HardMish})

RECOMPUTABLE: Mapping[str, Recompute] = MappingProxyType(
    {
        "relu": F.relu,
        "relu6": F.relu6,
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": partial(F.gelu, approximate="tanh"),
        "quick_gelu": _quick_gelu,
        "mish": F.mish,
        "hard_swish": F.hardswish,
        "hard_mish": _hard_mish,
        "sigmoid": torch.sigmoid,
        "hard_sigmoid": F.hardsigmoid,
        "tanh": torch.tanh,
        "elu": F.elu,
        "celu": F.celu,
        "selu": F.selu,
        "leaky_relu": F.leaky_relu,
        "softplus": F.softplus,
    }
)
"""Pure element-wise functions by timm's name, with the settings that the name stands for."""
