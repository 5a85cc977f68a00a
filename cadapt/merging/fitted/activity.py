"""How linear an adapter's activations are at work: the share of values in a range where σ has one slope.

A unit that is always on, or always off, is linear whatever σ is. A value counts where σ' is within 0.05 of 0 or of 1,
whichever of the two the unit has more often; for a ReLU, that is on or off.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_NEAR = 0.05
_HOMES = ("torch.nn.modules.activation", "timm.layers.activations", "timm.layers.activations_me")


class Activity:
    """Counts, over all pictures that run within :meth:`watching`, of one adapter's activations."""

    def __init__(self, adapter: nn.Module) -> None:
        self._modules = [module for module in adapter.modules() if type(module).__module__ in _HOMES]
        self._flat = [torch.zeros(1)] * len(self._modules)
        self._steep = [torch.zeros(1)] * len(self._modules)
        self._counts = [0] * len(self._modules)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, calls of the adapter are counted."""
        handles = [
            module.register_forward_pre_hook(self._note(index), prepend=True)
            for index, module in enumerate(self._modules)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, index: int) -> Any:
        def note(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            h = inputs[0]
            slope = _slope(module, h)
            channels = 1 if h.ndim == 4 else h.ndim - 1
            others = [axis for axis in range(h.ndim) if axis != channels]
            self._flat[index] = self._flat[index] + (slope.abs() < _NEAR).sum(dim=others)
            self._steep[index] = self._steep[index] + ((slope - 1).abs() < _NEAR).sum(dim=others)
            self._counts[index] += h.numel() // h.shape[channels]

        return note

    def linear_share(self) -> float | None:
        """The mean over units and activations; None where there is none, or none was called."""
        shares = [
            torch.maximum(flat, steep).double().mean() / count
            for flat, steep, count in zip(self._flat, self._steep, self._counts, strict=True)
            if count
        ]
        return float(torch.stack(shares).mean()) if shares else None


def _slope(activation: nn.Module, h: torch.Tensor) -> torch.Tensor:
    """σ'(h), by autograd."""
    with torch.enable_grad():
        h = h.detach().clone().requires_grad_()
        # of a copy, since it may work in place; and not by a call, which would be noted again
        given = type(activation).forward(activation, h.clone())
        slope: torch.Tensor = torch.autograd.grad(given.sum(), h)[0]
    return slope
