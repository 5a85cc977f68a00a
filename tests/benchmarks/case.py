"""One case of the benchmark of training steps: which model, at which batch, size and precision, and on which data.

Every contender starts from a copy of the model made here and is fed the batches made here, so that nothing but the way
of training differs between them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

SEED = 0
# distinct batches, so that nobody profits from having seen its input
BATCHES = 2
_CALIBRATION_IMAGES = 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured: ``size`` is the side of the square images in pixels, ``precision`` fp32 or bf16."""

    model: str
    batch: int
    size: int = 224
    precision: str = "fp32"
    device: str = "cpu"
    classes: int = 100

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.model} batch {self.batch}, {self.size} px, {self.precision}, {self.device}"


def make_model(case: Case) -> nn.Module:
    """Return the case's model with random weights that let every path carry a signal, on its device.

    timm starts the last norm of a residual branch at zero and layer scales near it: gradients through them would be
    zeros, and zeros can be cheaper to multiply. Norm weights are redrawn from 0.5 … 1.5, layer scales set to 0.1, and
    the statistics of batch norms taken from random images, as pretrained ones would fit theirs.
    """
    torch.manual_seed(SEED)
    options = {"img_size": case.size} if _fixed_size(case.model) else {}
    model: nn.Module = timm.create_model(case.model, pretrained=False, num_classes=case.classes, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("gamma") and parameter.ndim == 1:
                parameter.fill_(0.1)
    model = model.to(case.device)
    _calibrate(model, case)
    return model.train()


def make_batches(case: Case, count: int = BATCHES) -> list[tuple[Tensor, Tensor]]:
    """Return random images ``[B, 3, S, S]``, in the default memory format and fp32, with random labels ``[B]``."""
    generator = torch.Generator().manual_seed(SEED + 1)
    batches = []
    for _ in range(count):
        images = torch.randn(case.batch, 3, case.size, case.size, generator=generator)
        labels = torch.randint(case.classes, (case.batch,), generator=generator)
        batches.append((images.to(case.device), labels.to(case.device)))
    return batches


def _fixed_size(name: str) -> bool:
    """Whether timm builds the architecture for one size of image."""
    return name.startswith(("vit", "swin", "test_vit"))


@torch.no_grad()
def _calibrate(model: nn.Module, case: Case) -> None:
    """Set the statistics of batch norms to those of two random images."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    generator = torch.Generator().manual_seed(SEED + 2)
    images = torch.randn(_CALIBRATION_IMAGES, 3, case.size, case.size, generator=generator)
    model.train()(images.to(case.device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
