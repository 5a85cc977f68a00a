"""From folders and data sets to batches: reading, checking, splitting, augmenting and loading pictures, reproducibly.

``open_training_data`` and ``open_evaluation_data`` turn what a user names into :class:`Images`; :class:`TrainLoader`
and ``evaluation_batches`` turn those into tensors. Names that need torch bring it in when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cadapt.data.classes import ClassMatch, match_classes
from cadapt.data.folder import Images, ImageSet, find_images
from cadapt.data.images import BadImage, UnreadableImage, check_images, read_image
from cadapt.data.readable import UnreadableImages
from cadapt.data.source import EvaluationData, TrainingData, open_evaluation_data, open_training_data
from cadapt.data.split import FewShot, few_shot, split_images

if TYPE_CHECKING:
    from cadapt.data.augment import DEFAULT_PRESET, PRESETS, evaluation_transform, training_transform
    from cadapt.data.loader import TrainLoader, evaluation_batches
    from cadapt.data.mixup import Mixing, mix_batch

_HOMES = {
    "DEFAULT_PRESET": "augment",
    "PRESETS": "augment",
    "evaluation_transform": "augment",
    "training_transform": "augment",
    "TrainLoader": "loader",
    "evaluation_batches": "loader",
    "Mixing": "mixup",
    "mix_batch": "mixup",
}

__all__ = [
    "DEFAULT_PRESET",
    "PRESETS",
    "BadImage",
    "ClassMatch",
    "EvaluationData",
    "FewShot",
    "ImageSet",
    "Images",
    "Mixing",
    "TrainLoader",
    "TrainingData",
    "UnreadableImage",
    "UnreadableImages",
    "check_images",
    "evaluation_batches",
    "evaluation_transform",
    "few_shot",
    "find_images",
    "match_classes",
    "mix_batch",
    "open_evaluation_data",
    "open_training_data",
    "read_image",
    "split_images",
    "training_transform",
]


def __getattr__(name: str) -> Any:
    """Import the module that has the name, at its first use."""
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
