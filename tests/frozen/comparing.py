"""Lean operations against torch's own: results, gradients with their dtypes and strides, and what autograd keeps."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

FORMATS = (torch.contiguous_format, torch.channels_last)
DOUBLE, SINGLE = 1e-12, 1e-6


def difference(ours: Tensor, reference: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    assert (ours.shape, ours.dtype) == (reference.shape, reference.dtype)
    expected = reference.detach().double()
    return float((ours.detach().double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def assert_same(
    lean: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    tolerance: float = DOUBLE,
    autocast: bool = False,
) -> None:
    """Both functions give the same results, and the same gradients for all inputs that need one."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, reference = lean(*inputs), plain(*inputs)
    assert difference(ours, reference) <= tolerance
    assert ours.stride() == reference.stride()
    wanted = [item for item in inputs if item.requires_grad]
    weights = torch.randn_like(reference)
    pairs = zip(
        torch.autograd.grad(ours, wanted, weights), torch.autograd.grad(reference, wanted, weights), strict=True
    )
    for mine, other in pairs:
        assert difference(mine, other) <= tolerance
        assert mine.stride() == other.stride()


def kept(function: Callable[[], Any]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor that autograd keeps while a function runs."""
    seen: list[tuple[tuple[int, ...], torch.dtype]] = []

    def note(tensor: Tensor) -> Tensor:
        seen.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        function()
    return seen


def whole(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function compiled as one graph."""
    torch.compiler.reset()
    compiled: Callable[..., Tensor] = torch.compile(function, fullgraph=True, backend="aot_eager")
    return compiled


def map_of(
    *shape: int, dtype: torch.dtype = torch.float64, format: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """Random numbers that need a gradient, in a memory format."""
    return torch.randn(*shape, dtype=dtype).contiguous(memory_format=format).requires_grad_()
