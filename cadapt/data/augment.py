"""Turns a picture into the backbone's input, with one of a few named augmentations on the way.

Built on timm's transforms from the :class:`~cadapt.preprocessing.Preprocessing` an adapter file carries, and run by
:mod:`cadapt.data.fused`. Called with an RGB picture, what these functions return gives a tensor; the loaders have it
written into their batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import MaybeToTensor
from torchvision import transforms

from cadapt.data.fused import FusedTransform, Normalise, RandomCropFlip, Whole
from cadapt.errors import UsageError, close_matches
from cadapt.preprocessing import Preprocessing

Transform = Callable[[Image.Image], torch.Tensor]

DEFAULT_PRESET = "light"
PRESETS: Mapping[str, str] = {
    "none": "resize and centre crop, as in evaluation",
    "light": "random resized crop (20 to 100 % of the area) and horizontal flip: Conv-Adapter's recipe for FGVC",
    "structured": "resize to the input size without crop or flip, for tasks where place and direction matter",
    "standard": "light, colour jitter and a mild RandAugment (2 operations, magnitude 5)",
    "strong": "light, RandAugment (2 operations, magnitude 9) and random erasing",
}
_LIGHT: Mapping[str, Any] = {"is_training": True, "scale": (0.2, 1.0), "hflip": 0.5, "color_jitter": None}
_MILD, _MAGNITUDE_9 = "rand-m5-n2-mstd0.5", "rand-m9-n2-mstd0.5"


def training_transform(preset: str, preprocessing: Preprocessing) -> Transform:
    """Return the transform of a preset: RGB picture of any size → float32 ``[channels, height, width]``, normalised.

    Raises:
        UsageError: there is no such preset, or no input of that many channels.
    """
    if preset not in PRESETS:
        raise UsageError(f"no augmentation '{preset}'", hint=close_matches(preset, PRESETS))
    if preset == "none":
        return evaluation_transform(preprocessing)
    if preset == "structured":
        return _whole(preprocessing, crop_mode="squash", crop_pct=1.0)
    (crop, flip), _, last = _parts(preprocessing, re_prob=0.25 if preset == "strong" else 0.0, re_mode="pixel")
    between = []
    if preset == "standard":  # timm leaves colour jitter out wherever RandAugment is on, so each comes by itself
        between = [*_parts(preprocessing, color_jitter=0.3)[1], *_parts(preprocessing, auto_augment=_MILD)[1]]
    if preset == "strong":
        between = _parts(preprocessing, auto_augment=_MAGNITUDE_9)[1]
    return FusedTransform(
        preprocessing.input_size,
        RandomCropFlip(crop, flip),
        [*between, *_grey_input(preprocessing)],
        _normalise(preprocessing, exact=False),
        last[_tensor_step(last) + 2 :],
    )


def evaluation_transform(preprocessing: Preprocessing) -> Transform:
    """Return the model's own preprocessing: RGB picture → float32 ``[channels, height, width]``, nothing random.

    Raises:
        UsageError: the input has neither one channel nor three.
    """
    return _whole(preprocessing, crop_mode=preprocessing.crop_mode, crop_pct=preprocessing.crop_pct)


def _whole(preprocessing: Preprocessing, *, crop_mode: str, crop_pct: float) -> Transform:
    settings = _input_settings(preprocessing)
    timms = create_transform(is_training=False, crop_mode=crop_mode, crop_pct=crop_pct, **settings)
    steps = timms.transforms[: _tensor_step(timms.transforms)]
    geometry = Whole([*_grey_input(preprocessing), *steps])
    return FusedTransform(preprocessing.input_size, geometry, (), _normalise(preprocessing, exact=True))


def _tensor_step(steps: Sequence[Any]) -> int:
    """Return which of timm's steps makes a tensor of the picture; Normalize is the next."""
    return next(number for number, step in enumerate(steps) if isinstance(step, MaybeToTensor))


def _normalise(preprocessing: Preprocessing, *, exact: bool) -> Normalise:
    settings = _input_settings(preprocessing)
    return Normalise(preprocessing.input_size[2], settings["mean"], settings["std"], exact=exact)


def _parts(preprocessing: Preprocessing, **settings: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Return the steps of timm's training transform in its three parts: crop and flip, colours, tensor."""
    parts = create_transform(separate=True, **{**_input_settings(preprocessing), **_LIGHT, **settings})
    first, second, last = (list(part.transforms) for part in parts)
    return first, second, last


def _input_settings(preprocessing: Preprocessing) -> dict[str, Any]:
    channels = preprocessing.input_size[0]
    if channels not in (1, 3):
        raise UsageError(f"the backbone takes {channels} channels, expected 3 (RGB) or 1 (grey)")
    mean, std = preprocessing.mean, preprocessing.std
    if len(mean) != channels:  # a grey model that kept the colour statistics
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    return {
        "input_size": preprocessing.input_size,
        "interpolation": preprocessing.interpolation,
        "mean": mean,
        "std": std,
    }


def _grey_input(preprocessing: Preprocessing) -> list[Any]:
    return [transforms.Grayscale(1)] if preprocessing.input_size[0] == 1 else []
