"""iConFormer's formula in plain torch, one sample after the other, for tests to compare with. No conv is called."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

SIGMAS = {"relu": F.relu, "gelu": F.gelu, "identity": lambda x: x}


def reference(
    x: torch.Tensor,
    tensors: Mapping[str, torch.Tensor],
    *,
    layout: str,
    grid: tuple[int, int] | None = None,
    stride: int = 1,
    prefix: int = 0,
    sigma: str = "gelu",
    s: float = 1.0,
    normalise: bool = False,
) -> torch.Tensor:
    """Δ = s·W_up(z + k ∗ z), z = σ(W_d x), k = G(mean z): METHODS, section 4, of a batch in its layout."""
    outputs = []
    for sample in x:
        if layout == "NLC":
            assert grid is not None
            tokens, picture = sample[:prefix], sample[prefix:].reshape(*grid, -1).movedim(-1, 0)
        else:
            picture = sample.movedim(-1, 0) if layout == "NHWC" else sample
            tokens = picture.flatten(1).T[:0]
        delta, alone = _of_sample(picture[:, ::stride, ::stride], tokens, tensors, sigma, normalise)
        if layout == "NLC":
            outputs.append(s * torch.cat([alone, delta.flatten(1).T]))
        else:
            outputs.append(s * (delta.movedim(0, -1) if layout == "NHWC" else delta))
    return torch.stack(outputs)


def _of_sample(
    picture: torch.Tensor, tokens: torch.Tensor, tensors: Mapping[str, torch.Tensor], sigma: str, normalise: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Δ / s of one picture ``[C, H, W]``, and of its prefix tokens ``[P, C]``."""
    down, up = tensors["down.weight"][:, :, 0, 0], tensors["up.weight"][:, :, 0, 0]
    z = SIGMAS[sigma](torch.einsum("rc,chw->rhw", down, picture) + tensors["down.bias"][:, None, None])
    channels, height, width = z.shape
    pooled = z.sum((1, 2)) / (height * width)
    if normalise:
        pooled = pooled / pooled.square().sum().sqrt()
    taps = tensors["generator.weight"] @ pooled + tensors["generator.bias"]
    side = round((taps.numel() / channels) ** 0.5)
    kernels, reach = taps.reshape(channels, side, side), side // 2
    rows = []
    for top in range(height):
        for left in range(width):
            total = z[:, top, left]
            for row in range(side):
                for column in range(side):
                    here, there = top + row - reach, left + column - reach
                    if 0 <= here < height and 0 <= there < width:
                        total = total + kernels[:, row, column] * z[:, here, there]
            rows.append(up @ total + tensors["up.bias"])
    delta = torch.stack(rows, dim=1).reshape(-1, height, width)
    z_alone = SIGMAS[sigma](tokens @ down.T + tensors["down.bias"])
    alone = (z_alone * (1 + kernels[:, reach, reach])) @ up.T + tensors["up.bias"]
    return delta, alone
