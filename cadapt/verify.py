"""Proof that an insertion did what it says: the adapted model against its base, on a random batch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from cadapt.adapted import ADAPTERS, AdaptedModel, disabled
from cadapt.backbone import Backbone
from cadapt.errors import CadaptError


@dataclass(frozen=True, kw_only=True)
class InsertionCheck:
    """What was seen: whether outputs are bit-identical with the adapters on and off, and how far on is from the base.

    ``max_error`` is the largest absolute difference of the logits with the adapters on, ``scale`` the base's largest
    logit. ``reaches`` says whether adapters that are not zero change the outputs at all: a base whose last norms start
    at zero, as timm's ResNets with random weights do, mutes them.
    """

    identical_on: bool
    identical_off: bool
    max_error: float
    scale: float
    batch: int
    reaches: bool

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return asdict(self)


def check_insertion(backbone: Backbone, model: AdaptedModel, *, batch: int = 2, seed: int = 0) -> InsertionCheck:
    """Compare an adapted model, whose head is the base's own, with its base on one random batch in eval mode.

    Args:
        backbone: the untouched base.
        model: the adapted model; its adapters are disturbed once it has been compared.
        batch: pictures.
        seed: of the pictures' normal noise.

    Raises:
        CadaptError: switched off, the model is not its base bit for bit; nothing of it may be delivered.
    """
    size = backbone.preprocessing.input_size
    like = next(backbone.model.parameters())
    images = torch.randn((batch, *size), generator=torch.Generator().manual_seed(seed)).to(like.device, like.dtype)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            expected = backbone.model(images)
            adapted = model(images)
            with disabled(model):
                pristine = model(images)
            _disturb(model, seed)
            silent = not bool(expected.any())  # a classifier that starts at zero says nothing of what reaches it
            reaches = not model.plan.insertions or silent or not torch.equal(model(images), expected)
    finally:
        model.train(training)
    if not torch.equal(pristine, expected):
        worst = float((pristine - expected).abs().max())
        raise CadaptError(f"{backbone.base.name}: with its adapters off the model differs from the base by {worst:.3g}")
    return InsertionCheck(
        identical_on=bool(torch.equal(adapted, expected)),
        identical_off=True,
        max_error=float((adapted - expected).abs().max()),
        scale=float(expected.abs().max()),
        batch=batch,
        reaches=reaches,
    )


def _disturb(model: AdaptedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.startswith(f"{ADAPTERS}.") and not name.startswith(f"{ADAPTERS}.head."):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data + 0.1 * noise.to(parameter.device, parameter.dtype)
