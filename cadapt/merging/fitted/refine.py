"""Refining: a folded model trained to the unmerged model's logits, on pictures without labels.

Knowledge distillation (Hinton et al., arXiv 1503.02531) by the squared difference of logits: the layers that took
kernels up and the adapters that stay are trained, all else is frozen and norms keep their statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from cadapt.adapted import AdaptedModel
from cadapt.merging.fitted.options import Batches

# of a tensor's RMS, per step of Adam: relative, since kernels and scales differ by orders of magnitude
_STEP = 0.004
_LEAST_RMS = 1e-3


def refine(
    model: AdaptedModel,
    teacher: nn.Module,
    batches: Batches,
    *,
    paths: Iterable[str],
    epochs: int,
    on_progress: Callable[[str], None],
) -> None:
    """Train modules of a folded model in place, until its logits are nearer to the teacher's.

    Args:
        model: in fp32 and eval mode, which it stays in.
        teacher: the unmerged model.
        batches: pictures ``[B, C, H, W]``; labels are not looked at.
        paths: of the modules to train.
        epochs: passes over the pictures.
        on_progress: called with a line per epoch.
    """
    tensors = [parameter for path in paths for parameter in model.get_submodule(path).parameters()]
    optimizer = torch.optim.Adam([{"params": [item], "lr": _rate(item)} for item in tensors])
    wanted = _logits(teacher, batches)
    scale = torch.cat(wanted).var().clamp_min(torch.finfo(torch.float32).tiny)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine(epochs * len(wanted)))
    for parameter in tensors:
        parameter.requires_grad_(True)
    for epoch in range(epochs):
        losses = []
        for (images, _), logits in zip(batches, wanted, strict=True):
            loss = (model(images) - logits).square().mean() / scale
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        on_progress(f"refining: epoch {epoch + 1} of {epochs}, loss {sum(losses) / len(losses):.4f}")
    for parameter in tensors:
        parameter.requires_grad_(False)


@torch.no_grad()
def _logits(teacher: nn.Module, batches: Batches) -> list[torch.Tensor]:
    return [teacher(images) for images, _ in batches]


def _rate(parameter: torch.Tensor) -> float:
    return _STEP * max(float(parameter.detach().square().mean().sqrt()), _LEAST_RMS)


def _cosine(steps: int) -> Callable[[int], float]:
    return lambda step: 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))
