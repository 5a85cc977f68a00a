"""What the engine asks of the data and of the weights' file: protocols, so that it imports neither."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    Batch = tuple[Tensor, Tensor]


class TrainBatches(Protocol):
    """Training batches as a pure function of (seed, epoch, position), however many workers make them."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch."""
        ...

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield images [B, C, H, W] and int64 labels [B] of an epoch (from 0), from batch ``start_step`` on."""
        ...


class SaveWeights(Protocol):
    """Writes what the model has learnt to a file, atomically, with the record of its training."""

    def __call__(self, path: Path, model: nn.Module, record: dict[str, Any], /) -> None:
        """Write ``path``."""
        ...


class PrepareForward(Protocol):
    """Makes the module that training runs in the model's place: the same computation over the same parameters."""

    def __call__(self, model: nn.Module, precision: str, /) -> nn.Module:
        """Prepare a model that is on its device, in training mode; the precision is a resolved one."""
        ...


@dataclass(frozen=True, kw_only=True)
class FitData:
    """What to train on.

    Args:
        train: the training batches.
        classes: their names, in the order of the labels.
        validation: returns the validation batches, each call the same ones, or None.
        record: JSON that identifies the data; a run resumes only on data with an equal record.
    """

    train: TrainBatches
    classes: tuple[str, ...]
    validation: Callable[[], Iterable[Batch]] | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
