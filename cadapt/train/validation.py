"""Loss and accuracy on the validation images, after each epoch: what the best epoch is chosen by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from cadapt.errors import CadaptError
from cadapt.train.meter import Meter
from cadapt.train.signals import StopRequest
from cadapt.train.stepper import Stepper

if TYPE_CHECKING:
    from cadapt.train.protocols import Batch


class ValidationStoppedError(Exception):
    """A stop was requested before all validation images were seen; the engine saves and ends the run."""


def validate(
    model: nn.Module, stepper: Stepper, batches: Iterable[Batch], device: torch.device, stop: StopRequest
) -> dict[str, float]:
    """Return ``val_loss`` (mean cross-entropy, unsmoothed) and ``val_top1``; the model is left in evaluation mode.

    Raises:
        ValidationStoppedError: a stop was requested.
        CadaptError: there are no images, or the loss is not finite.
    """
    model.eval()
    meter = Meter(device)
    with torch.inference_mode():
        for images, labels in batches:
            if stop.received is not None:
                raise ValidationStoppedError
            images, labels = stepper.to_device(images, labels)
            logits = stepper.logits(images)
            loss_sum = functional.cross_entropy(logits, labels, reduction="sum")
            meter.add(loss_sum, (logits.argmax(1) == labels).sum(), len(labels))
    means = meter.read()
    if means.images == 0:
        raise CadaptError("there are no validation images", hint="train without validation, or give some images")
    if means.loss != means.loss or means.loss == float("inf"):
        raise CadaptError("the validation loss is not finite", hint="lower --lr, or use --precision fp32")
    return {"val_loss": means.loss, "val_top1": means.top1}
