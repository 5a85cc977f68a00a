"""Linear layers of a frozen backbone: the gradient goes through them, the input is not kept.

With y = x Wᵀ + b, the gradient for x is G W and that for b the sum of G over all rows; only the weight's, Gᵀ x, needs
x. Torch's own `F.linear` knows this and keeps W alone; it is written out here for the sake of the faster products of
`products`, in both directions.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from cadapt.frozen.functions import products
from cadapt.frozen.functions.casting import autocast_dtype, cast, cast_bias, cast_with_source


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` with a weight that needs no gradient: keeps the weight, and nothing of the input.

    Args:
        x: […, in].
        weight: [out, in], frozen.
        bias: [out], frozen or trained, or None.

    Returns:
        […, out], in autocast's dtype where that is on.
    """
    dtype = autocast_dtype(x.device)
    x, weight, bias = cast(x, dtype), cast(weight.detach(), dtype), cast_bias(bias, dtype)
    y: Tensor = _FrozenLinear.apply(x, weight, bias)
    return y


def linear_through(
    y: Tensor, source: Tensor, recompute: Callable[[Tensor], Tensor], weight: Tensor, bias: Tensor | None
) -> Tensor:
    """`F.linear(y, weight, bias)` that keeps what y was made of in y's place.

    Args:
        y: […, in], equal to ``recompute(source)``; gradients reach it as usual.
        source: The tensor to keep; no gradient goes to it from here.
        recompute: A pure function, called once more in backward where the weight needs a gradient.
        weight: [out, in], frozen or trained.
        bias: [out] or None, frozen or trained.

    Returns:
        […, out], in autocast's dtype where that is on.
    """
    if not weight.requires_grad:
        return frozen_linear(y, weight, bias)
    dtype = autocast_dtype(y.device)
    y, source = cast_with_source(y, source, dtype)
    weight, bias = cast(weight, dtype), cast_bias(bias, dtype)
    result: Tensor = _LinearThrough.apply(y, source.detach(), recompute, weight, bias)
    return result


class _FrozenLinear(Function):
    """Keeps the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(weight)
        return products.linear(x, weight, bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        for_x, _, for_bias = ctx.needs_input_grad
        return _input_gradient(grad, weight) if for_x else None, None, _bias_gradient(grad) if for_bias else None


class _LinearThrough(Function):
    """Keeps the weight and the input's source."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        y: Tensor,
        source: Tensor,
        recompute: Callable[[Tensor], Tensor],
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(source, weight)
        ctx.recompute = recompute
        return products.linear(y, weight, bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        source, weight = ctx.saved_tensors
        for_y, _, _, for_weight, for_bias = ctx.needs_input_grad
        weight_grad = None
        if for_weight:
            y = ctx.recompute(source).to(weight.dtype)
            weight_grad = _weight_gradient(grad, y)
            del y
        y_grad = _input_gradient(grad, weight) if for_y else None
        return y_grad, None, None, weight_grad, _bias_gradient(grad) if for_bias else None


def _input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    return products.linear(grad, weight.t(), None)


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    return products.linear(_rows(grad).t(), _rows(x).t(), None)


def _bias_gradient(grad: Tensor) -> Tensor:
    return _rows(grad).sum(0)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
