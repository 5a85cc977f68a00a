"""The learning rate of each optimizer step, in closed form, so that a resumed run needs no scheduler state."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi

from cadapt.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up to ``lr``, then half a cosine that ends at ``min_lr`` with the last step.

    >>> schedule = Schedule(lr=1.0, min_lr=0.0, warmup_steps=2, total_steps=5)
    >>> [round(schedule.lr_at(step), 3) for step in range(5)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """

    lr: float
    min_lr: float
    warmup_steps: int
    total_steps: int

    def lr_at(self, step: int) -> float:
        """Return the learning rate of optimizer step ``step``, counted from 0 over the whole run."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        share = (step - self.warmup_steps) / max(1, self.total_steps - 1 - self.warmup_steps)
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + cos(pi * min(1.0, share)))


def warmup_epochs_of(config: TrainConfig) -> int:
    """Return the epochs of warm-up: those asked for, or a tenth of the run where they would eat more than a quarter.

    >>> warmup_epochs_of(TrainConfig(epochs=100)), warmup_epochs_of(TrainConfig(epochs=20))
    (10, 2)
    """
    return config.warmup_epochs if 4 * config.warmup_epochs <= config.epochs else config.epochs // 10


def schedule_of(config: TrainConfig, steps_per_epoch: int) -> Schedule:
    """Return the schedule of a run that takes ``steps_per_epoch`` optimizer steps per epoch."""
    return Schedule(
        lr=config.lr,
        min_lr=config.min_lr,
        warmup_steps=warmup_epochs_of(config) * steps_per_epoch,
        total_steps=config.epochs * steps_per_epoch,
    )
