"""How good a model is on labelled images: accuracy, calibration and the confusion between classes.

``cadapt eval`` shows the result, training picks its best epoch by it, and the merge and export reports compare by it.
Batches are counted as they come and forgotten, so that memory does not grow with the data.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadapt.errors import CadaptError, UsageError, close_matches

Precision = Literal["fp32", "bf16", "fp16"]

CALIBRATION_BINS = 15
# a table of more classes is read by nobody and takes gigabytes: ImageNet-21k's has 477 million cells
MAX_CONFUSION_CLASSES = 2000

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class ClassResult:
    """How many of one class's images there were and were recognised; ``recall`` is None for a class without images."""

    name: str
    images: int
    correct: int
    recall: float | None


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """The figures of one evaluation; shares are between 0 and 1.

    Args:
        images: how many were seen.
        top1: share of images whose largest output is the true class; of equal outputs the first counts as the largest.
        top5: share whose true class is among the five largest outputs; None for a model of five outputs or fewer.
        mean_per_class: mean recall over the classes that have images.
        ece: expected calibration error over 15 bins of equal width (Guo et al., arXiv 1706.04599, equation 3).
        loss: mean negative log-likelihood of the true class, in nats.
        per_class: one entry for each class, in the order of the labels.
        confusion: images by true class (rows, all classes) and predicted class (columns, all outputs of the model);
            None above 2000 classes.
        seconds: duration, reading of the data included.
        images_per_second: images over seconds.
    """

    images: int
    top1: float
    top5: float | None
    mean_per_class: float
    ece: float
    loss: float
    per_class: tuple[ClassResult, ...]
    confusion: tuple[tuple[int, ...], ...] | None
    seconds: float
    images_per_second: float

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object: the fields, tuples as lists."""
        record = asdict(self)
        record["per_class"] = [asdict(item) for item in self.per_class]
        record["confusion"] = None if self.confusion is None else [list(row) for row in self.confusion]
        return record


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    classes: Sequence[str],
    device: torch.device | str | None = None,
    precision: Precision = "fp32",
    on_batch: Callable[[int], None] | None = None,
) -> EvalResult:
    """Run a model over labelled images and count.

    Args:
        model: maps images ``[B, C, H, W]`` to outputs ``[B, K]`` before softmax. Runs in eval mode; each module's own
            mode is put back afterwards, on failure too.
        batches: pairs of float images ``[B, C, H, W]`` and integer labels ``[B]`` below ``len(classes)``.
        classes: names in the order of the labels, K or fewer.
        device: where to run; the model is moved there and stays. None is where its parameters are.
        precision: ``fp32``, or ``bf16`` or ``fp16`` by autocast.
        on_batch: called after each batch with the number of images so far.

    Raises:
        UsageError: the precision is unknown.
        CadaptError: there are no images, a label has no class, the model has fewer outputs than there are classes, or
            it gives outputs that are not finite.
    """
    if precision not in ("fp32", *_AUTOCAST):
        raise UsageError(f"unknown precision '{precision}'", hint=close_matches(precision, ("fp32", *_AUTOCAST)))
    place = _place(model, device)
    tally: _Tally | None = None
    started = time.perf_counter()
    with _eval_mode(model):
        for number, (images, labels) in enumerate(batches, start=1):
            logits = _forward(model, images, place, precision)
            tally = tally or _Tally(outputs=logits.shape[-1], classes=classes)
            tally.add(logits, labels.cpu(), number)
            if on_batch is not None:
                on_batch(tally.images)
    if tally is None or tally.images == 0:
        raise CadaptError("there are no images to evaluate on", hint="check the folder and the split")
    return tally.result(seconds=time.perf_counter() - started)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which forward passes run in ``fp32``, ``bf16`` or ``fp16``; training uses it too."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=_AUTOCAST[precision])


def _place(model: nn.Module, device: torch.device | str | None) -> torch.device:
    if device is not None:
        model.to(device)
        return torch.device(device)
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        # train() first, for modules that drop caches there; then what differed from its parent, a frozen norm for one
        model.train(modes[0][1])
        for module, training in modes:
            module.training = training


def _forward(model: nn.Module, images: Tensor, device: torch.device, precision: Precision) -> Tensor:
    """Return outputs ``[B, K]`` on the CPU, in float64 so that sums do not depend on the batch size."""
    images = images.to(device, non_blocking=True)
    if images.dim() == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), autocast(precision, device):
        logits = model(images)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != images.shape[0]:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise CadaptError(f"{type(model).__name__} gives {got}, expected outputs of shape [{images.shape[0]}, classes]")
    # to the CPU first: some devices have no float64
    return logits.cpu().double()


class _Tally:
    """Running sums over batches: nothing in it grows with the number of images."""

    def __init__(self, *, outputs: int, classes: Sequence[str]) -> None:
        if len(classes) > outputs:
            raise CadaptError(f"the model has {outputs} outputs, but there are {len(classes)} classes")
        self.classes = tuple(classes)
        self.outputs = outputs
        self.images = 0
        self.in_top5 = 0
        self.loss = 0.0
        self.per_class = torch.zeros(len(classes), dtype=torch.int64)
        self.correct = torch.zeros(len(classes), dtype=torch.int64)
        # count, correct and summed confidence of each bin
        self.bins = torch.zeros(3, CALIBRATION_BINS, dtype=torch.float64)
        tabled = max(len(classes), outputs) <= MAX_CONFUSION_CLASSES
        self.confusion = torch.zeros(len(classes), outputs, dtype=torch.int64) if tabled else None

    def add(self, logits: Tensor, labels: Tensor, number: int) -> None:
        """Count one batch: outputs ``[B, K]`` in float64, labels ``[B]``, and which batch it is, from 1."""
        self._check(logits, labels, number)
        labels = labels.long()
        predicted = logits.argmax(dim=1)
        hit = predicted == labels
        self.images += len(labels)
        self.in_top5 += int((_rank(logits, labels) < 5).sum())
        self.loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        self.per_class += torch.bincount(labels, minlength=len(self.classes))
        self.correct += torch.bincount(labels[hit], minlength=len(self.classes))
        self._add_calibration(logits.softmax(dim=1).amax(dim=1), hit)
        if self.confusion is not None:
            self.confusion.index_put_((labels, predicted), torch.ones_like(labels), accumulate=True)

    def _check(self, logits: Tensor, labels: Tensor, number: int) -> None:
        if labels.shape != logits.shape[:1] or labels.is_floating_point():
            kind = f"{list(labels.shape)} of {labels.dtype}"
            raise CadaptError(f"labels of batch {number} are {kind}, expected [{len(logits)}] whole numbers")
        if logits.shape[1] != self.outputs:
            raise CadaptError(f"batch {number} has {logits.shape[1]} outputs, the ones before had {self.outputs}")
        outside = labels[(labels < 0) | (labels >= len(self.classes))]
        if len(outside):
            message = f"label {int(outside[0])} in batch {number} has no class: there are {len(self.classes)} classes"
            raise CadaptError(f"{message} and {self.outputs} model outputs", hint="use data with the model's classes")
        broken = int((~logits.isfinite()).any(dim=1).sum())
        if broken:
            message = f"the model gives NaN or infinite outputs for {broken} of {len(logits)} images in batch {number}"
            raise CadaptError(
                message, hint="try fp32; if it persists, the training diverged or the weights are damaged"
            )

    def _add_calibration(self, confidence: Tensor, hit: Tensor) -> None:
        # bins are open below and closed above, as in the paper: a confidence of 1 falls into the last
        place = (confidence * CALIBRATION_BINS).ceil().long().sub(1).clamp(0, CALIBRATION_BINS - 1)
        for row, values in zip(self.bins, (torch.ones_like(confidence), hit.double(), confidence), strict=True):
            row.index_add_(0, place, values)

    def result(self, *, seconds: float) -> EvalResult:
        """Turn the sums into figures."""
        recalls = [
            hits / images if images else None
            for hits, images in zip(self.correct.tolist(), self.per_class.tolist(), strict=True)
        ]
        present = [recall for recall in recalls if recall is not None]
        _, right, confidence = self.bins
        return EvalResult(
            images=self.images,
            top1=int(self.correct.sum()) / self.images,
            top5=self.in_top5 / self.images if self.outputs > 5 else None,
            mean_per_class=sum(present) / len(present),
            ece=float((right - confidence).abs().sum()) / self.images,
            loss=self.loss / self.images,
            per_class=tuple(
                ClassResult(name=name, images=images, correct=hits, recall=recall)
                for name, images, hits, recall in zip(
                    self.classes, self.per_class.tolist(), self.correct.tolist(), recalls, strict=True
                )
            ),
            confusion=None if self.confusion is None else tuple(tuple(row) for row in self.confusion.tolist()),
            seconds=seconds,
            images_per_second=self.images / seconds,
        )


def _rank(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how many outputs come before the true class's; equal ones come in their order, as in argmax. Shape [B]."""
    own = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1]) < labels[:, None]
    return ((logits > own) | ((logits == own) & earlier)).sum(dim=1)
