"""Layer and group norms whose affine is frozen, which keep their input as it came and a pair of numbers per group.

With x̂ = (x − μ) r, r = (σ² + ε)^(−½) and g = w ⊙ G, the input's gradient is r (g − mean(g) − x̂ mean(g x̂)), the means
taken over what is normalised (Ba et al. 2016; Wu & He 2018). Torch keeps just x, μ and r for it; but on a GPU autocast
runs norms in float32, and torch keeps the input cast to it, twice its size. Here that copy lives for two calls only.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_DX_ONLY = [True, False, False]


def frozen_layer_norm(
    x: Tensor, normalized_shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """`F.layer_norm` with a frozen affine.

    Args:
        x: […, *normalized_shape]. Kept in its own dtype, with μ and r per row.
        normalized_shape: The last dimensions, over which to normalise.
        weight: ``normalized_shape``, frozen, or None.
        bias: ``normalized_shape``, frozen, or None.
        eps: Added to the variance.

    Returns:
        x's shape; in float32 where autocast has it so, else x's dtype.
    """
    shape = tuple(normalized_shape)
    if not casts_up(x):
        return F.layer_norm(x, shape, _frozen(weight), _frozen(bias), eps)
    y: Tensor = _WideLayerNorm.apply(x, shape, _wide(weight), _wide(bias), eps)
    return y


def frozen_group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`F.group_norm` with a frozen affine.

    Args:
        x: [B, C, …]. Kept in its own dtype, with μ and r per picture and group.
        groups: Into how many groups the channels are cut.
        weight: [C], frozen, or None.
        bias: [C], frozen, or None.
        eps: Added to the variance.

    Returns:
        x's shape; in float32 where autocast has it so, else x's dtype.
    """
    if not casts_up(x):
        return F.group_norm(x, groups, _frozen(weight), _frozen(bias), eps)
    y: Tensor = _WideGroupNorm.apply(x, groups, _wide(weight), _wide(bias), eps)
    return y


def casts_up(x: Tensor) -> bool:
    """Whether autocast would run a norm of this tensor in float32: everywhere but on the CPU, and in half precision."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return half and x.device.type not in ("cpu", "meta") and torch.is_autocast_enabled(x.device.type)


def _frozen(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach()


def _wide(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach().float()


class _WideLayerNorm(Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        y, mean, inverse = torch.native_layer_norm(x.float(), shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, inverse, weight, bias)
        ctx.shape = shape
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, mean, inverse, weight, bias = ctx.saved_tensors
        x_grad = torch.ops.aten.native_layer_norm_backward(
            grad,
            x.float(),
            ctx.shape,
            mean,
            inverse,
            weight,
            bias,
            _DX_ONLY,
        )[0]
        return x_grad.to(x.dtype), None, None, None, None


class _WideGroupNorm(Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        batch, channels = x.shape[:2]
        sizes = (batch, channels, x.numel() // (batch * channels), groups)
        y, mean, inverse = torch.native_group_norm(x.float().contiguous(), weight, bias, *sizes, eps)
        ctx.save_for_backward(x, mean, inverse, weight)
        ctx.sizes = sizes
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, mean, inverse, weight = ctx.saved_tensors
        wide = x.float().contiguous()
        x_grad = torch.ops.aten.native_group_norm_backward(
            grad.contiguous(),
            wide,
            mean,
            inverse,
            weight,
            *ctx.sizes,
            _DX_ONLY,
        )[0]
        return x_grad.to(x.dtype), None, None, None, None
