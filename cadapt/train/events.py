"""What a running engine tells whoever watches: plain values, so that a display never reaches into the loop.

Epochs and steps are counted from 1 here, as people count them. ``loss`` is the mean cross-entropy per image, ``top1``
a share in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class RunStarted:
    """The run begins, or goes on after ``epochs_done`` epochs and ``steps_done`` steps of the next."""

    epochs: int
    steps_per_epoch: int
    epochs_done: int
    steps_done: int
    device: str
    precision: str
    trainable_parameters: int


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """An optimizer step; sent when numbers are at hand, not for each step. Loss and accuracy are the epoch's so far."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    top1: float
    lr: float
    images_per_second: float
    eta_seconds: float


@dataclass(frozen=True, kw_only=True)
class EpochDone:
    """An epoch with its validation (``validation`` is empty without validation images)."""

    epoch: int
    epochs: int
    loss: float
    top1: float
    lr: float
    images_per_second: float
    seconds: float
    is_best: bool
    validation: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Weights and state are on the disk, in the run folder ``path``."""

    path: str
    epoch: int
    step: int


@dataclass(frozen=True, kw_only=True)
class Notice:
    """One line that the user should read."""

    message: str


Event = RunStarted | StepDone | EpochDone | Saved | Notice
