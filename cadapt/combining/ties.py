"""TIES: trim each task vector to its largest entries, elect a sign for each entry, and average those that agree.

Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", arXiv 2306.01708, section 4.2 and algorithm 1.
Trimming goes by the magnitudes of a whole vector, not of each tensor by itself, as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from cadapt.combining.settings import Settings
from cadapt.combining.vectors import Vector

# what fp64 leaves of a sum that is zero on paper, relative to its terms
_ROUNDING = 1e-12


def merge_ties(vectors: Sequence[Vector], settings: Settings) -> dict[str, torch.Tensor]:
    """λ times the disjoint mean of the trimmed vectors, each with its weight."""
    trimmed = [trim(vector, settings.density) for vector in vectors]
    names = dict.fromkeys(name for vector in trimmed for name in vector)
    merged = {}
    for name in names:
        having = [(vector[name], w) for vector, w in zip(trimmed, settings.weights, strict=True) if name in vector]
        merged[name] = settings.scale * _disjoint_mean([value for value, _ in having], [weight for _, weight in having])
    return merged


def trim(vector: Vector, density: float) -> dict[str, torch.Tensor]:
    """Keep the largest entries of a vector by magnitude, this share of them and at least one; the others are zero.

    Entries as large as the smallest that is kept are kept as well.
    """
    if density == 1 or not vector:
        return dict(vector)
    magnitudes = torch.cat([value.abs().flatten() for value in vector.values()])
    kept = max(1, round(density * magnitudes.numel()))
    smallest = torch.kthvalue(magnitudes, magnitudes.numel() - kept + 1).values
    return {name: torch.where(value.abs() >= smallest, value, 0.0) for name, value in vector.items()}


def _disjoint_mean(values: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """The mean of the values whose sign is that of the weighted sum; zeros take no part."""
    weighted = torch.stack([weight * value for value, weight in zip(values, weights, strict=True)])
    total = weighted.sum(dim=0)
    # a sign is not elected by the rounding of values that cancel
    elected = torch.where(total.abs() > _ROUNDING * weighted.abs().sum(dim=0), total.sign(), 0.0)
    agrees = (weighted.sign() == elected) & (elected != 0)
    sizes = torch.tensor([abs(weight) for weight in weights], dtype=weighted.dtype)
    share = (agrees * sizes.reshape(-1, *[1] * (weighted.dim() - 1))).sum(dim=0)
    agreed = (weighted * agrees).sum(dim=0)
    return torch.where(share > 0, agreed / share.clamp_min(torch.finfo(share.dtype).tiny), 0.0)


def shared_signs(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """How many entries neither of two trimmed vectors has at zero, and at how many of them the signs disagree."""
    # of signs, whose product cannot vanish by rounding
    products = [first[name].sign() * second[name].sign() for name in first if name in second]
    return sum(int((item != 0).sum()) for item in products), sum(int((item < 0).sum()) for item in products)
