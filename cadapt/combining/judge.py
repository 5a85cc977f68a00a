"""What combinations are worth on one task's pictures: its own model and every combination, in one pass over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from cadapt.combining.heads import JoinedHead
from cadapt.errors import CadaptError


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Top-1 on one task's pictures: of its own model, and of each combination with the task known and not."""

    images: int
    alone: float
    known: Mapping[str, float]
    open: Mapping[str, float | None]


def judge(
    own: nn.Module,
    combined: Mapping[str, nn.Module],
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    *,
    columns: slice,
    task: int,
    joined: JoinedHead | None,
    device: torch.device,
    on_batch: Callable[[int], None] | None = None,
) -> Judged:
    """Count right predictions.

    Args:
        own: the task's own model.
        combined: models that give all tasks' logits side by side, by method.
        batches: the task's pictures ``[B, C, H, W]`` with labels ``[B]``, in its own order of classes.
        columns: where its logits stand among all.
        task: its number.
        joined: the head for all classes, None where there is none.
        device: where to run; the models are moved there and stay.
        on_batch: called after each batch with the number of pictures so far.

    Raises:
        CadaptError: there are no pictures, or outputs are not finite.
    """
    images, alone = 0, 0
    known, over_all = dict.fromkeys(combined, 0), dict.fromkeys(combined, 0)
    for model in (own, *combined.values()):
        model.to(device).eval()
    for pictures, labels in batches:
        batch = pictures.to(device)
        images += len(labels)
        alone += _hits(_logits(own, batch), labels)
        for name, model in combined.items():
            logits = _logits(model, batch)
            known[name] += _hits(logits[:, columns], labels)
            if joined is not None:
                places = torch.tensor(joined.places[task])
                over_all[name] += _hits(logits @ joined.matrix.T, places[labels])
        if on_batch is not None:
            on_batch(images)
    if not images:
        raise CadaptError("there are no pictures to judge the combination on", hint="check the folder")
    return Judged(
        images=images,
        alone=alone / images,
        known={name: hits / images for name, hits in known.items()},
        open={name: None if joined is None else hits / images for name, hits in over_all.items()},
    )


def _hits(logits: torch.Tensor, labels: torch.Tensor) -> int:
    return int((logits.argmax(dim=1) == labels).sum())


def _logits(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Logits ``[B, classes]`` in fp64 on the CPU."""
    with torch.inference_mode():
        logits: torch.Tensor = model(batch)
    logits = logits.cpu().double()
    if not bool(logits.isfinite().all()):
        raise CadaptError(
            "a model gives outputs that are no numbers", hint="its training diverged; or a smaller --scale"
        )
    return logits
