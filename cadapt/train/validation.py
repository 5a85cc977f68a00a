"""Loss and accuracy on the validation images, after each epoch: what the best epoch is chosen by.

The figures are those of :func:`cadapt.evaluation.evaluate`, so that ``cadapt eval`` on the same images repeats them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from cadapt.evaluation import evaluate
from cadapt.train.signals import StopRequest

if TYPE_CHECKING:
    from cadapt.train.protocols import Batch


class ValidationStoppedError(Exception):
    """A stop was requested before all validation images were seen; the engine saves and ends the run."""


def validate(
    model: nn.Module, batches: Iterable[Batch], *, classes: tuple[str, ...], precision: Any, stop: StopRequest
) -> dict[str, float]:
    """Return ``val_loss`` (mean cross-entropy, unsmoothed) and ``val_top1``.

    Raises:
        ValidationStoppedError: a stop was requested.
        CadaptError: there are no images, or the model's outputs are not finite.
    """
    result = evaluate(model, _until_stopped(batches, stop), classes=classes, precision=precision)
    return {"val_loss": result.loss, "val_top1": result.top1}


def _until_stopped(batches: Iterable[Batch], stop: StopRequest) -> Iterator[Batch]:
    for batch in batches:
        if stop.received is not None:
            raise ValidationStoppedError
        yield batch
