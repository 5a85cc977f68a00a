"""Adapters of several tasks on one tiny base, with parameters that training could have left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import nn

import cadapt
from cadapt.adapted import AdaptedModel
from tests.models import randomise

SIZE = 32


def make_base(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomise(timm.create_model("test_resnet"), seed).eval()


@torch.no_grad()
def make_task(
    base: nn.Module, scheme: str, classes: Sequence[str], *, task: int, size: float = 0.05, **settings: Any
) -> AdaptedModel:
    """An adapter whose every trained tensor is moved at random, otherwise for each task."""
    model = cadapt.insert(base, scheme=scheme, num_classes=len(classes), img_size=SIZE, **settings).eval()
    generator = torch.Generator().manual_seed(task)
    for name, tensor in model.trained_tensors().items():
        if tensor.is_floating_point() and not name.endswith("running_var"):
            tensor.add_(size * torch.randn(tensor.shape, generator=generator))
    model.classes = tuple(classes)
    return model


def pictures(count: int = 3) -> torch.Tensor:
    return torch.randn((count, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(9))
