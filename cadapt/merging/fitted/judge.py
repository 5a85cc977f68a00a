"""Two models on the same pictures: predictions and logits of the folded one beside those of the unmerged one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cadapt.errors import CadaptError


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The logits ``[N, classes]`` of a model for some pictures, in fp64, and their labels ``[N]``, below 0 for none."""

    logits: Tensor
    labels: Tensor

    @property
    def top1(self) -> float | None:
        """Share of labelled pictures that are predicted right; None without labels."""
        known = self.labels >= 0
        if not bool(known.any()):
            return None
        return float((self.logits.argmax(dim=1) == self.labels)[known].double().mean())


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A model against another on the same pictures.

    ``agreement`` is the share of equal predictions, ``max_logit_error`` the largest difference of a logit, and
    ``logit_error`` their RMS difference over the RMS of the wanted logits about their mean.
    """

    agreement: float
    max_logit_error: float
    logit_error: float


@torch.no_grad()
def answer(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Answers:
    """Run a model over pictures ``[B, C, H, W]`` with labels ``[B]``.

    Raises:
        CadaptError: its outputs are no finite numbers.
    """
    logits, labels = [], []
    for images, known in batches:
        found = model(images).double()
        if not bool(found.isfinite().all()):
            raise CadaptError("the model gives NaN or infinite outputs in fp32: there is nothing to compare")
        logits.append(found)
        labels.append(known)
    return Answers(logits=torch.cat(logits), labels=torch.cat(labels))


def compare(got: Answers, wanted: Answers) -> Difference:
    """Compare what two models say of the same pictures."""
    difference = got.logits - wanted.logits
    about = wanted.logits - wanted.logits.mean(dim=1, keepdim=True)
    scale = float(about.square().mean().sqrt())
    return Difference(
        agreement=float((got.logits.argmax(dim=1) == wanted.logits.argmax(dim=1)).double().mean()),
        max_logit_error=float(difference.abs().max()),
        logit_error=float(difference.square().mean().sqrt()) / (scale or 1.0),
    )
