"""Linear combinations of task vectors: their weighted sum, and their mean.

Ilharco et al., "Editing Models with Task Arithmetic", arXiv 2212.04089, section 4 (learning via addition): θ_0 + λ Σ τ.
The mean is what averaging the models' own weights gives, Wortsman et al., "Model soups", arXiv 2203.05482, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cadapt.combining.settings import Settings, shares
from cadapt.combining.vectors import Vector, weighted_sum


def add(vectors: Sequence[Vector], settings: Settings) -> dict[str, torch.Tensor]:
    """Σ w_t τ_t."""
    return weighted_sum(vectors, settings.weights)


def average(vectors: Sequence[Vector], settings: Settings) -> dict[str, torch.Tensor]:
    """Σ w_t τ_t / Σ |w_t|: the mean where the weights are equal."""
    signs = (1.0 if weight >= 0 else -1.0 for weight in settings.weights)
    return weighted_sum(vectors, [sign * share for sign, share in zip(signs, shares(settings.weights), strict=True)])
