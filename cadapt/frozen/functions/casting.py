"""What autocast would do to the operands of a convolution or a matrix product.

An `autograd.Function` hides its inside from autocast, so the fronts of this package cast before they enter one: the
casts are then ordinary autograd nodes, which keep nothing and return gradients in the operand's own dtype.
"""

import torch
from torch import Tensor


def has_autocast(kind: str) -> bool:
    """Whether autocast knows a kind of device; it does not know ``meta``."""
    return kind != "meta" and torch.amp.is_autocast_available(kind)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast computes products in on a device now, or None where it is off."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor in autocast's dtype; as it is where autocast is off (None) or, as autocast has it, in float64."""
    if dtype is None or tensor.dtype == dtype or tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype)


def cast_bias(bias: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """The same for a bias that may be missing."""
    return None if bias is None else cast(bias, dtype)


def cast_with_source(y: Tensor, source: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """The same for an operand and what is kept in its place; where the two are one, its cast is what is kept."""
    narrow = cast(y, dtype)
    return narrow, narrow if source is y else source
