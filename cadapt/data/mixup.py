"""Mixup and CutMix on a batch, as timm computes them, drawn from the seed, the epoch and the step.

The training loop calls it on the batches of :mod:`cadapt.data.loader`; a run that is taken up again in the middle of an
epoch mixes the same pictures in the same shares.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.data.mixup import Mixup, mixup_target

from cadapt.data.seeding import derive_seed, preserved_generators, seed_generators
from cadapt.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """How to mix: the Beta distributions' parameters (0 is off); where both are on, each batch gets one by even chance.

    Labels are smoothed in the loss, not here.
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0

    def __post_init__(self) -> None:
        for name in ("mixup_alpha", "cutmix_alpha"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name}: got {getattr(self, name)}, expected 0 (off) or more")

    @property
    def active(self) -> bool:
        """Whether batches are mixed at all."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0


def mix_batch(
    images: torch.Tensor, labels: torch.Tensor, mixing: Mixing, classes: int, *, seed: int, epoch: int, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix each picture with another of its batch, by shares that depend on (seed, epoch, step) alone.

    The last picture of an odd batch has no partner and stays as it is. The given tensors are left unchanged.

    Args:
        images: ``[B, C, H, W]``, floating point, on any device.
        labels: ``[B]`` int64.
        classes: how many there are.

    Returns:
        The pictures ``[B, C, H, W]``, and ``[B, classes]`` targets whose rows sum to 1.
    """
    mixer = Mixup(
        mixup_alpha=mixing.mixup_alpha,
        cutmix_alpha=mixing.cutmix_alpha,
        prob=1.0,
        switch_prob=0.5,
        label_smoothing=0.0,
        num_classes=classes,
    )
    mixer.mixup_enabled = mixing.active
    paired = len(images) - len(images) % 2
    with preserved_generators():
        seed_generators(derive_seed("mixup", seed, epoch, step))
        mixed, targets = mixer(images[:paired].clone(), labels[:paired])
    if paired < len(images):
        alone = mixup_target(labels[-1:], classes)
        mixed, targets = torch.cat([mixed, images[-1:]]), torch.cat([targets, alone])
    return mixed, targets
