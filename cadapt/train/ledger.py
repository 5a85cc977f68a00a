"""Where a run stands: its position, its time and its best epoch so far, all of it part of the saved state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(kw_only=True)
class Ledger:
    """The running account of a run; the one value here that changes, because it is what the loop moves along.

    Args:
        epoch: epochs done. ``step``: optimizer steps done in the next one; all of them when it awaits validation.
        images: images trained on. ``train_seconds``: time in training steps; ``seconds``: all time, up to ``mark``.
        losses: mean training loss of each epoch done.
        best_epoch: from 1; 0 before the first epoch's end. ``best`` and ``final`` are metrics by name.
    """

    epoch: int = 0
    step: int = 0
    images: int = 0
    train_seconds: float = 0.0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    best_epoch: int = 0
    best: dict[str, float] = field(default_factory=dict)
    final: dict[str, float] = field(default_factory=dict)

    def close_epoch(self, metrics: Mapping[str, float]) -> bool:
        """Enter the metrics of the epoch at hand, go on to the next, and return whether it is the best so far."""
        is_best = self.best_epoch == 0 or is_better(metrics, self.best)
        self.epoch, self.step = self.epoch + 1, 0
        self.losses.append(metrics["loss"])
        self.final = dict(metrics)
        if is_best:
            self.best_epoch, self.best = self.epoch, dict(metrics)
        return is_best

    def to_state(self) -> dict[str, Any]:
        """Return the ledger as plain values."""
        return asdict(self)


def is_better(metrics: Mapping[str, float], best: Mapping[str, float]) -> bool:
    """Return whether an epoch beats the best one so far.

    The higher validation accuracy wins, at equal accuracy the lower validation loss, at equal loss the earlier epoch.
    Without validation the later epoch wins: there is nothing to choose by, since training loss rewards overfitting.

    >>> is_better({"val_top1": 0.9, "val_loss": 0.2}, {"val_top1": 0.9, "val_loss": 0.3})
    True
    """
    if "val_top1" not in metrics:
        return True
    return (metrics["val_top1"], -metrics["val_loss"]) > (best["val_top1"], -best["val_loss"])
