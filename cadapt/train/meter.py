"""Running sums of loss and accuracy that stay on the device, so that no step waits for the GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Means:
    """Mean loss per image and top-1 share over ``images`` images."""

    loss: float
    top1: float
    images: int


class Meter:
    """Sums of loss, correct images and images; float64, but on mps, which has none."""

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(3, dtype=dtype, device=device)

    def add(self, loss_sum: Tensor, correct: Tensor, images: int) -> None:
        """Add a batch: the sum of its losses, its correctly classified images, and its size."""
        self._sums[0] += loss_sum
        self._sums[1] += correct
        self._sums[2] += images

    def read(self) -> Means:
        """Return the means so far, which waits for the device; NaN where there were no images."""
        loss, correct, images = self._sums.tolist()
        if images == 0:
            return Means(loss=float("nan"), top1=float("nan"), images=0)
        return Means(loss=loss / images, top1=correct / images, images=int(images))

    def reset(self) -> None:
        """Start anew."""
        self._sums.zero_()

    def state(self) -> Tensor:
        """Return a copy of the sums on the CPU."""
        return self._sums.to("cpu", copy=True)

    def load_state(self, state: Tensor) -> None:
        """Take over what :meth:`state` returned."""
        self._sums.copy_(state)
