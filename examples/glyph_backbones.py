"""The two small backbones that the examples adapt, and their weights: both were pretrained on printed characters.

A ConvNet (``pretrain_glyphs.py``) and a plain ViT of the same picture size (``pretrain_glyphs_vit.py``), so that every
method can be shown on the kind of model it was made for. Neither has been shown a digit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from glyph_pictures import CLASSES
from safetensors.torch import load_file
from torch import nn

IMAGE_SIZE = 32
"""Side of the pictures in pixels."""

WEIGHTS_FOLDER = Path(__file__).resolve().parent / "weights"
"""Where the shipped weights are."""


@dataclass(frozen=True, kw_only=True)
class GlyphBackbone:
    """One of the backbones: timm's architecture, how to create it, and how a table calls it."""

    architecture: str
    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def weights_name(self) -> str:
        """The file name of its weights."""
        return f"glyphs_{self.architecture}.safetensors"

    def create(self) -> nn.Module:
        """Return the model with random weights, taking pictures ``[B, 3, IMAGE_SIZE, IMAGE_SIZE]`` in [-1, 1]."""
        model: nn.Module = timm.create_model(self.architecture, num_classes=len(CLASSES), **self.settings)
        return model

    def load(self, folder: Path = WEIGHTS_FOLDER) -> nn.Module:
        """Return the pretrained model in eval mode.

        Raises:
            FileNotFoundError: the folder has no weights for it.
            RuntimeError: the weights are another architecture's.
        """
        model = self.create()
        model.load_state_dict(load_file(folder / self.weights_name))
        return model.eval()


BACKBONES: Mapping[str, GlyphBackbone] = {
    "test_resnet": GlyphBackbone(architecture="test_resnet", title="ResNet"),
    # six blocks of width 64 on 8×8 tokens and a class token
    "test_vit": GlyphBackbone(architecture="test_vit", title="ViT", settings={"img_size": IMAGE_SIZE, "patch_size": 4}),
}
"""By timm's name of the architecture."""
