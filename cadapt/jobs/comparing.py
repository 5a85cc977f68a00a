"""Two models on the same pictures, in one pass: what a merge changed of the answers that matter to its user."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cadapt.errors import CadaptError
from cadapt.merging import OnData
from cadapt.tolerance import Tolerance


@dataclass(kw_only=True)
class _Sums:
    """Running sums over batches: nothing in it grows with the number of pictures."""

    images: int = 0
    right_before: int = 0
    right_after: int = 0
    agreeing: int = 0
    largest: float = 0.0
    squared_error: float = 0.0
    squared: float = 0.0

    def add(self, before: Tensor, after: Tensor, labels: Tensor) -> None:
        """Count one batch: logits ``[B, K]`` in float64 of both models, and labels ``[B]``."""
        told_before, told_after, error = before.argmax(dim=1), after.argmax(dim=1), (after - before).abs()
        self.images += len(labels)
        self.right_before += int((told_before == labels).sum())
        self.right_after += int((told_after == labels).sum())
        self.agreeing += int((told_before == told_after).sum())
        self.largest = max(self.largest, float(error.max()))
        self.squared_error += float(error.square().sum())
        # about each picture's mean: what all classes have in common changes no answer
        self.squared += float((before - before.mean(dim=1, keepdim=True)).square().sum())

    def result(self) -> OnData:
        """Turn the sums into figures."""
        return OnData(
            images=self.images,
            top1_before=self.right_before / self.images,
            top1_after=self.right_after / self.images,
            agreement=self.agreeing / self.images,
            max_logit_error=self.largest,
            logit_error=(self.squared_error / (self.squared or 1.0)) ** 0.5,
        )


def compare_on_data(
    before: nn.Module,
    after: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> OnData:
    """Run two models over the same labelled pictures.

    Args:
        before: the unmerged model; left as it is.
        after: the merged one; left as it is.
        batches: float pictures ``[B, C, H, W]`` and labels ``[B]``.
        dtype: what both compute in.
        device: where; None is the CPU.

    Raises:
        CadaptError: there are no pictures, or a model gives what is not finite.
    """
    place = device or torch.device("cpu")
    one, other = (copy.deepcopy(model).to(place, dtype).eval() for model in (before, after))
    sums = _Sums()
    for images, labels in batches:
        given = images.to(place, dtype)
        with torch.inference_mode():
            found = [model(given).cpu().double() for model in (one, other)]
        for name, logits in zip(("unmerged", "merged"), found, strict=True):
            if not bool(logits.isfinite().all()):
                kind = str(dtype).removeprefix("torch.")
                raise CadaptError(
                    f"the {name} model gives NaN or infinite outputs in {kind}",
                    hint="try --dtype fp32; if it persists, the training diverged or the weights are damaged",
                )
        sums.add(found[0], found[1], labels)
    if sums.images == 0:
        raise CadaptError("there are no images to compare the models on", hint="check the folder and the split")
    return sums.result()


def is_within(tolerance: Tolerance, found: OnData) -> bool:
    """Whether two models differ by no more than a tolerance allows."""
    return tolerance.allows(
        top1_lost=found.top1_before - found.top1_after,
        disagreement=1 - found.agreement,
        max_logit_error=found.max_logit_error,
    )


def describe_miss(tolerance: Tolerance, found: OnData) -> str:
    """Say by how much a tolerance is missed."""
    said = {
        "top1": f"top-1 falls by {found.top1_before - found.top1_after:.2%}, to {found.top1_after:.2%}",
        "disagreement": f"{1 - found.agreement:.2%} of predictions differ",
        "logit": f"a logit differs by {found.max_logit_error:.3g}",
    }[tolerance.metric]
    return f"the merged model is not within {tolerance}: {said} on {found.images} pictures"
