"""Evaluating a trained adapter on image files, its classes matched with theirs by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cadapt.adapted import AdaptedModel
from cadapt.bundle import Bundle
from cadapt.data import (
    ClassMatch,
    evaluation_batches,
    match_classes,
    open_evaluation_data,
)
from cadapt.errors import CadaptError, RefusedError, UsageError, close_matches
from cadapt.evaluation import EvalResult, evaluate
from cadapt.jobs.task import Progress, default_workers
from cadapt.library import base_of, from_bundle
from cadapt.train.hardware import resolve_device, resolve_precision

_PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """An evaluation: its figures, how the data's classes match the model's, and what the data was."""

    result: EvalResult
    match: ClassMatch
    dropped: int
    data: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {
            "schema": 1,
            **self.result.to_json(),
            "missing_in_data": list(self.match.missing_in_data),
            "unknown_to_model": list(self.match.unknown_to_model),
            "dropped_images": self.dropped,
            "data": dict(self.data),
        }


def trained_model(bundle: Bundle, *, checkpoint: Path | None = None, near: Path | None = None) -> AdaptedModel:
    """Build a trained adapter's model.

    Raises:
        CadaptError: it was never trained, so its outputs mean nothing yet.
    """
    if not bundle.classes:
        raise CadaptError(
            "the adapter was not trained: it has no classes yet",
            hint="cadapt train DATA; from Python, set model.classes before cadapt.save",
        )
    return from_bundle(bundle, base_of(bundle, checkpoint=checkpoint, near=near))


def evaluate_model(
    model: AdaptedModel,
    source: str,
    *,
    batch_size: int = 64,
    device: str = "auto",
    precision: str = "auto",
    workers: int | None = None,
    skip_bad: bool = False,
    on_progress: Progress | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Evaluated:
    """Evaluate a trained model on image files, matching classes by name.

    Pictures of classes the model does not know cannot be judged; they are left out and counted.

    Raises:
        UsageError: a device or a precision that is unknown or not to be had.
        RefusedError: none of the data's classes is the model's, or pictures are unreadable.
    """
    # before the pictures are read, which takes its time
    place = resolve_device(device)
    if precision not in _PRECISIONS:
        raise UsageError(f"unknown precision '{precision}'", hint=close_matches(precision, _PRECISIONS))
    precision = resolve_precision(precision, place)
    processes = default_workers() if workers is None else workers
    data = open_evaluation_data(source, skip_bad=skip_bad, workers=max(1, processes), on_progress=on_progress)
    match = match_classes(model.classes, data.classes)
    if not match.index_map:
        raise RefusedError(
            f"none of the data's classes ({', '.join(data.classes[:3])} …) is the model's "
            f"({', '.join(model.classes[:3])} …)",
            hint="name the folders as the model's classes, which cadapt inspect FILE lists",
        )
    images = data.images.relabel(match.index_map, model.classes)
    result = evaluate(
        model,
        evaluation_batches(images, model.preprocessing, batch_size, processes),
        classes=model.classes,
        device=place,
        precision=precision,  # type: ignore[arg-type]
        on_batch=on_batch,
    )
    return Evaluated(result=result, match=match, dropped=len(data.images) - len(images), data=data.record)
