"""DARE: drop most entries of each task vector at random and enlarge the rest, so that the vector's mean stays.

Yu et al., "Language Models are Super Mario", arXiv 2311.03099, section 3.2: δ̃ = m ⊙ δ / (1 − p), with m drawn from a
Bernoulli distribution; what is left is added with each task's weight (section 3.3, DARE with task arithmetic).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from cadapt.combining.settings import Settings
from cadapt.combining.vectors import Vector, weighted_sum
from cadapt.hashing import hash_tensors


def merge_dare(vectors: Sequence[Vector], settings: Settings) -> dict[str, torch.Tensor]:
    """Σ w_t m_t ⊙ τ_t / (1 − p), where 1 − p is the density."""
    return weighted_sum([drop(vector, settings.density, settings.seed) for vector in vectors], settings.weights)


def drop(vector: Vector, density: float, seed: int) -> dict[str, torch.Tensor]:
    """Keep each entry with this probability, divided by it.

    What is drawn depends on the seed and on the vector itself, so that the order of the tasks makes no difference.
    """
    identity = hash_tensors(vector.items())
    rescaled = {}
    for name, value in vector.items():
        own = int.from_bytes(hashlib.sha256(f"{seed}:{identity}:{name}".encode()).digest()[:7])
        generator = torch.Generator().manual_seed(own)
        kept = torch.rand(value.shape, generator=generator, dtype=torch.float64) < density
        rescaled[name] = torch.where(kept, value / density, 0.0)
    return rescaled
