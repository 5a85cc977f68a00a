"""A module's twin without data: the same structure on the meta device, for tracing and counting.

Whatever needs a model's shapes but not its values (the graph layer, the cost) works on such a twin, so that the
user's model is neither copied nor touched. It costs milliseconds, whatever the size of the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


def meta_copy(module: nn.Module) -> nn.Module:
    """Return a deep copy whose tensors are on the meta device, without copying any data.

    Parameters, buffers (persistent or not) and tensors held anywhere else in the module are replaced by twins of the
    same shape, strides and dtype. Shared tensors stay shared, ``requires_grad`` and the mode are kept, gradients are
    left out, and the argument is left as it was. A module that is on the meta device already is simply copied.

    >>> twin = meta_copy(nn.Linear(3, 2))
    >>> twin.weight.shape, twin.weight.device.type
    (torch.Size([2, 3]), 'meta')
    """
    return twin_copy(module, _twin)


def twin_copy(module: nn.Module, make: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """Return a deep copy whose tensors are what ``make`` gives for each; the rest is as :func:`meta_copy` says."""
    with _TwinTensors(make):
        return copy.deepcopy(module)


class _TwinTensors(TorchFunctionMode):
    """While it is on, copying a tensor gives its twin: ``deepcopy`` finds every tensor, however nested."""

    def __init__(self, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._make = make

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.__deepcopy__:
            return self._remembered(*args)
        if func is torch.Tensor.clone:  # what Parameter.__deepcopy__ calls on its data
            return self._make(args[0])
        return func(*args, **(kwargs or {}))

    def _remembered(self, tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
        if id(tensor) not in memo:
            # unlike torch's own copy this takes tensors that a graph made: the twin is a new leaf
            memo[id(tensor)] = self._make(tensor).requires_grad_(tensor.requires_grad)
        twin: torch.Tensor = memo[id(tensor)]
        return twin


def _twin(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")
