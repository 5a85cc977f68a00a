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
    with _MetaTensors():
        return copy.deepcopy(module)


class _MetaTensors(TorchFunctionMode):
    """While it is on, copying a tensor gives a meta twin of it: ``deepcopy`` finds every tensor, however nested."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.__deepcopy__:
            return _remembered_twin(*args)
        if func is torch.Tensor.clone:  # what Parameter.__deepcopy__ calls on its data
            return _twin(args[0])
        return func(*args, **(kwargs or {}))


def _remembered_twin(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    if id(tensor) not in memo:
        # unlike torch's own copy this takes tensors that a graph made: the meta twin is a new leaf
        memo[id(tensor)] = _twin(tensor).requires_grad_(tensor.requires_grad)
    twin: torch.Tensor = memo[id(tensor)]
    return twin


def _twin(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")
