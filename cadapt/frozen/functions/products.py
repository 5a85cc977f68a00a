"""Matrix products by oneDNN, which torch leaves to MKL for float32 on the CPU.

MKL runs at half its speed on processors that its maker did not build, while oneDNN asks what the processor can do.
Everything else (half precision, GPUs, compiled graphs) goes the way torch chooses.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL = 1 << 14
"""Operands with fewer elements than this stay with torch: the product costs less than finding oneDNN's plan for it."""


def takes_onednn(x: Tensor) -> bool:
    """Whether products of a tensor should be asked of oneDNN by name."""
    return (
        x.is_cpu
        and x.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and torch._C._has_mkldnn
        and torch._C._get_mkldnn_enabled()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x · weightᵀ + bias, for use without autograd.

    Args:
        x: […, in].
        weight: [out, in], in either memory order.
        bias: [out], or None.

    Returns:
        […, out].
    """
    if takes_onednn(x) and x.numel() >= SMALL:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return result
    return F.linear(x, weight, bias)
