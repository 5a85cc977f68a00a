"""What a training run is on, as the user asked for it, and what came of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from cadapt.bundle import Bundle
from cadapt.data import (
    DEFAULT_PRESET,
    PRESETS,
)
from cadapt.errors import UsageError, close_matches
from cadapt.train import TrainResult

Progress = Callable[[int, int], None]
_MOST_WORKERS = 8


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What a training run is on: the data, how it is split and augmented, and the head that is put on it."""

    data: str
    val: str | None = None
    val_split: float = 0.1
    shots: int | None = None
    augment: str = DEFAULT_PRESET
    skip_bad: bool = False
    head_norm: bool = False
    head_dropout: float = 0.2
    new_head: bool = False

    def __post_init__(self) -> None:
        if self.augment not in PRESETS:
            raise UsageError(f"unknown augmentation '{self.augment}'", hint=close_matches(self.augment, PRESETS))
        if not 0 <= self.head_dropout < 1:
            raise UsageError(f"head dropout is {self.head_dropout:g}, expected 0 up to 1", hint="--head-dropout 0.2")

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that :meth:`from_json` reads back to an equal value."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> TaskOptions:
        """Read the options back from a run's record; what is not known here is left out."""
        known = {item.name for item in fields(cls)}
        return cls(**{key: value for key, value in record.items() if key in known})


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished run: the adapter file's content, the engine's result, and what the data was."""

    bundle: Bundle
    result: TrainResult
    trainable_parameters: int
    data: Mapping[str, Any]


def default_workers() -> int:
    """Reader processes when the user names no number: one less than the cores, so that training has one."""
    return min(_MOST_WORKERS, max(1, (os.cpu_count() or 1) - 1))
