"""What a combination is asked for, checked before anything is read. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cadapt.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The numbers of the methods; each takes what it needs.

    Args:
        weights: the factor of each task's vector, in the order of the tasks; negative ones subtract a task.
        density: the share of a vector's entries that TIES keeps, the largest, and DARE keeps, drawn at random.
        scale: λ of TIES, the factor of what is merged.
        seed: of what DARE drops.

    Raises:
        UsageError: a value out of its range.
    """

    weights: tuple[float, ...]
    density: float = 0.2
    scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not all(math.isfinite(weight) for weight in self.weights) or not any(self.weights):
            shown = ",".join(f"{weight:g}" for weight in self.weights)
            raise UsageError(f"weights are {shown}, expected numbers, not all zero", hint="--weights 1,1")
        if not 0 < self.density <= 1:
            raise UsageError(f"density is {self.density:g}, expected above 0 up to 1", hint="--density 0.2")
        if not math.isfinite(self.scale):
            raise UsageError(f"scale is {self.scale:g}, expected a number", hint="--scale 1")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed is {self.seed}, expected 0 to 2**63 - 1", hint="--seed 0")


def shares(weights: Sequence[float]) -> tuple[float, ...]:
    """The weights' magnitudes as shares of 1.

    >>> shares((3.0, -1.0))
    (0.75, 0.25)
    """
    total = sum(abs(weight) for weight in weights)
    return tuple(abs(weight) / total for weight in weights)
