"""The training engine's outer layer: everything between a data set and a trained adapter.

The loop, the schedule, saving, resuming and interrupting live here; what a picture looks like is the business of
``cadapt.data``. Importing this package imports no torch: the command line reads :class:`TrainConfig` before anything
heavy is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cadapt.train.config import TrainConfig
from cadapt.train.events import EpochDone, Event, Notice, RunStarted, Saved, StepDone
from cadapt.train.folder import RunFolder
from cadapt.train.protocols import FitData
from cadapt.train.result import TrainResult
from cadapt.train.schedule import Schedule

if TYPE_CHECKING:
    from cadapt.train.engine import fit

__all__ = [
    "EpochDone",
    "Event",
    "FitData",
    "Notice",
    "RunFolder",
    "RunStarted",
    "Saved",
    "Schedule",
    "StepDone",
    "TrainConfig",
    "TrainResult",
    "fit",
]


def __getattr__(name: str) -> Any:
    """Import the engine, and torch with it, only when it is asked for."""
    if name != "fit":
        raise AttributeError(f"module 'cadapt.train' has no attribute {name!r}")
    from cadapt.train.engine import fit

    return fit
