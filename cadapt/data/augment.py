"""Turns a picture into the backbone's input, with one of a few named augmentations on the way.

Built on timm's transforms from the :class:`~cadapt.preprocessing.Preprocessing` an adapter file carries. Training and
evaluation loaders call what these functions return with an RGB picture and get a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import MaybeToTensor
from torchvision import transforms

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
    first, _, last = _parts(preprocessing, re_prob=0.25 if preset == "strong" else 0.0, re_mode="pixel")
    between = []
    if preset == "standard":  # timm leaves colour jitter out wherever RandAugment is on, so each comes by itself
        between = [_parts(preprocessing, color_jitter=0.3)[1], _parts(preprocessing, auto_augment=_MILD)[1]]
    if preset == "strong":
        between = [_parts(preprocessing, auto_augment=_MAGNITUDE_9)[1]]
    return _chain(preprocessing, first, *between, *_grey_input(preprocessing), _fast(last, preprocessing))


def evaluation_transform(preprocessing: Preprocessing) -> Transform:
    """Return the model's own preprocessing: RGB picture → float32 ``[channels, height, width]``, nothing random.

    Raises:
        UsageError: the input has neither one channel nor three.
    """
    return _whole(preprocessing, crop_mode=preprocessing.crop_mode, crop_pct=preprocessing.crop_pct)


class PixelsToTensor:
    """timm's last two steps, scaling to [0, 1] and normalising, by a table of the 256 values a pixel may have.

    The table is made by those steps, so the result is the same to the last bit, in a quarter of the time.

    Args:
        steps: what turns a picture into the normalised tensor.
        channels: 1 or 3.
    """

    def __init__(self, steps: Transform, channels: int) -> None:
        every_value = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
        if channels > 1:
            every_value = Image.merge("RGB", [every_value] * channels)
        self.steps = steps
        self.table: npt.NDArray[np.float32] = steps(every_value).reshape(channels, 256).numpy()

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return the picture as float32 ``[channels, height, width]``."""
        pixels = np.asarray(image)
        planes = pixels.reshape(*pixels.shape[:2], -1)
        result = np.empty((planes.shape[2], *planes.shape[:2]), dtype=np.float32)
        for channel, values in enumerate(self.table):
            # "clip" spares a check: no uint8 is beyond the table.
            np.take(values, planes[:, :, channel], out=result[channel], mode="clip")
        return torch.from_numpy(result)

    def __repr__(self) -> str:
        """Return the steps it stands for."""
        return f"PixelsToTensor({self.steps})"


def _fast(transform: Any, preprocessing: Preprocessing) -> Any:
    """Replace the end of one of timm's transforms, whose steps from the tensor on are MaybeToTensor and Normalize."""
    steps = transform.transforms
    first = next(number for number, step in enumerate(steps) if isinstance(step, MaybeToTensor))
    exact = PixelsToTensor(transforms.Compose(steps[first : first + 2]), preprocessing.input_size[0])
    return transforms.Compose([*steps[:first], exact, *steps[first + 2 :]])


def _whole(preprocessing: Preprocessing, *, crop_mode: str, crop_pct: float) -> Transform:
    timms = create_transform(
        is_training=False, crop_mode=crop_mode, crop_pct=crop_pct, **_input_settings(preprocessing)
    )
    transform = _fast(timms, preprocessing)
    return _chain(preprocessing, *_grey_input(preprocessing), transform)


def _parts(preprocessing: Preprocessing, **settings: Any) -> tuple[Any, Any, Any]:
    """Return timm's training transform in its three parts: crop and flip, colours, tensor."""
    parts = create_transform(separate=True, **{**_input_settings(preprocessing), **_LIGHT, **settings})
    return cast("tuple[Any, Any, Any]", parts)


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


def _chain(preprocessing: Preprocessing, *steps: Any) -> Transform:
    return cast(Transform, transforms.Compose([_at_least_two_pixels, *steps]))


def _at_least_two_pixels(image: Image.Image) -> Image.Image:
    """Double a side of one pixel, of which a random crop could take none."""
    if min(image.size) > 1:
        return image
    return image.resize((max(image.width, 2), max(image.height, 2)), Image.Resampling.NEAREST)
