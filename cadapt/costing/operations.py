"""Counting a model's multiply–accumulates, by two conventions; :mod:`cadapt.costing` says what each counts.

torch's counter does it, on a twin without data; attention is there in its unfused form, two matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from cadapt.costing.rehearsal import explaining

Convention = Literal["macs", "paper"]
CONVENTIONS: tuple[Convention, ...] = ("macs", "paper")


def count_macs(twin: nn.Module, size: Sequence[int], convention: Convention) -> int:
    """Count the multiply–accumulates of one image's forward pass in eval mode.

    Args:
        twin: a model on the meta device, whose mode and ``requires_grad`` are changed.
        size: channels, height and width of the image.
        convention: how to count.

    Raises:
        CadaptError: the forward pass fails.
    """
    # torch's counter fails on a module that is fed a view of a parameter that wants a gradient
    twin.eval().requires_grad_(False)
    counter = FlopCounterMode(display=False, custom_mapping=_PAPER if convention == "paper" else None)
    shape = (1, *size)
    floating = (parameter.dtype for parameter in twin.parameters() if parameter.is_floating_point())
    image = torch.empty(shape, dtype=next(floating, torch.get_default_dtype()), device="meta")
    with explaining(twin, shape), torch.no_grad(), counter:
        twin(image)
    return int(counter.get_total_flops()) // 2


def _elements(*args: Any, out_shape: Sequence[int], **kwargs: Any) -> int:
    return 2 * math.prod(out_shape)


def _biased_convolution(
    x_shape: Any, w_shape: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, *args: Any,
    out_shape: Any, **kwargs: Any,
) -> int:  # fmt: skip
    doubled = int(conv_flop_count(x_shape, w_shape, out_shape, transposed=transposed))
    return doubled + (0 if bias is None else _elements(out_shape=out_shape))


def _group_norm(*args: Any, out_shape: Any, **kwargs: Any) -> int:
    return 2 * _elements(out_shape=out_shape[0])


def _batch_norm(x: Any, weight: Any, bias: Any, mean: Any, *args: Any, out_shape: Any, **kwargs: Any) -> int:
    # without running statistics it is no layer but a standardisation of weights written as a batch norm
    return 0 if mean is None else 2 * _elements(out_shape=out_shape[0])


_aten = torch.ops.aten
# what the paper counts beside; values are twice the MACs
_PAPER: dict[Any, Callable[..., int]] = {
    _aten.convolution: _biased_convolution,
    _aten.native_group_norm: _group_norm,
    _aten.native_batch_norm: _batch_norm,
    **{
        getattr(_aten, name): _elements
        for kind in ("relu", "hardtanh", "elu", "leaky_relu", "_prelu_kernel", "relu6")
        for name in (kind, f"{kind}_")
        if hasattr(_aten, name)
    },
}
