"""What a finished run has to show: the value that ``fit`` returns and a command prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

LONGEST_CURVE = 50


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The outcome of a run, over all its resumptions.

    Args:
        epochs: epochs trained; ``steps`` optimizer steps.
        best_epoch: the epoch, from 1, whose weights are the best.
        best: that epoch's metrics: ``val_top1`` and ``val_loss`` where there are validation images, ``loss``, ``top1``.
        final: the last epoch's.
        seconds: time spent, validation and saving included; ``images_per_second`` is over training alone.
        loss_curve: mean training loss of the epochs, thinned to at most 50.
        skipped_steps: steps left out because fp16 gradients overflowed.
        device, precision: what ``auto`` became.
        kept: which weights the model holds.
    """

    epochs: int
    steps: int
    best_epoch: int
    best: Mapping[str, float]
    final: Mapping[str, float]
    seconds: float
    images_per_second: float
    device: str
    precision: str
    kept: str
    skipped_steps: int = 0
    loss_curve: tuple[float, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Return the result as a JSON object."""
        return asdict(self) | {"loss_curve": list(self.loss_curve)}


def thinned(curve: tuple[float, ...], longest: int = LONGEST_CURVE) -> tuple[float, ...]:
    """Return at most ``longest`` values of a curve, evenly spaced, its first and last among them.

    >>> thinned((5.0, 4.0, 3.0, 2.0, 1.0), longest=3)
    (5.0, 3.0, 1.0)
    """
    if len(curve) <= longest:
        return curve
    return tuple(curve[round(place * (len(curve) - 1) / (longest - 1))] for place in range(longest))
