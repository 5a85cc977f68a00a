"""Runs a picture's transform in few passes over memory: decode a crop, resize it, write it normalised into its batch.

:mod:`cadapt.data.augment` builds these from timm's transforms, whose settings and random draws they keep; the loaders'
workers let them write into the batch's own memory, pixel by pixel (``[B, H, W, C]``, torch's channels_last).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp
from torch import Tensor
from torchvision import transforms

from cadapt.data.encoded import Box, DecodedPicture, Picture

Step = Callable[[Image.Image], Image.Image]
_BY_TORCH = ("bilinear", "bicubic")


class Geometry(Protocol):
    """The first part of a transform: from a picture of any size to pixels of the input's size."""

    def __call__(self, picture: Picture) -> Tensor:
        """Return uint8 ``[H, W, 3]``."""


class FusedTransform:
    """A transform that takes pictures not decoded yet and writes where it is told to.

    Args:
        shape: of the result, ``(C, H, W)``.
        geometry: from the picture to its pixels.
        colours: steps on 8-bit pictures of the input's size.
        normalise: the step to floating point.
        last: steps that change the normalised tensor ``[C, H, W]`` in place.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        geometry: Geometry,
        colours: Sequence[Step],
        normalise: Normalise,
        last: Sequence[Callable[[Tensor], Tensor]] = (),
    ) -> None:
        self.shape = shape
        self._geometry = geometry
        self._colours = tuple(colours)
        self._normalise = normalise
        self._last = tuple(last)

    def __call__(self, image: Image.Image) -> Tensor:
        """Return an RGB picture's float32 tensor ``[C, H, W]``."""
        channels, height, width = self.shape
        result = torch.empty((height, width, channels))
        self.write(DecodedPicture(image), result)
        return result.permute(2, 0, 1).contiguous()

    def write(self, picture: Picture, out: Tensor) -> None:
        """Write the picture's input into ``out``, float32 ``[H, W, C]``, contiguous.

        Raises:
            UnreadableImage: the picture could not be decoded.
        """
        if min(picture.size) < 2:
            picture = DecodedPicture(_at_least_two_pixels(picture.whole()))
        pixels = self._geometry(picture)
        if self._colours:
            image = Image.fromarray(pixels.numpy())
            for step in self._colours:
                image = step(image)
            pixels = pixels_of(image)
        self._normalise(pixels, out)
        for change in self._last:
            change(out.permute(2, 0, 1))

    def __repr__(self) -> str:
        """Return the steps, in their order."""
        steps = [self._geometry, *self._colours, self._normalise, *self._last]
        return f"FusedTransform({', '.join(map(str, steps))})"


class RandomCropFlip:
    """timm's random resized crop and a horizontal flip, on a picture not decoded yet.

    The crop is drawn as timm draws it, number for number, and the flip from the same generator, Python's. Bilinear and
    bicubic crops are resized by torch's vectorised 8-bit kernels. Where these round otherwise than Pillow, pixels
    differ by one level; where bicubic overshoots beside black or white, few (one in ten thousand) by some more.

    Args:
        crop: holds the size, the ranges of area and aspect ratio, and the interpolation (one or several).
        flip: holds the chance.
    """

    def __init__(self, crop: RandomResizedCropAndInterpolation, flip: transforms.RandomHorizontalFlip) -> None:
        self._crop = crop
        self._flip = flip
        self._logarithms = (math.log(crop.ratio[0]), math.log(crop.ratio[1]))

    def __call__(self, picture: Picture) -> Tensor:
        """Return uint8 ``[H, W, 3]``."""
        height, width = self._crop.size
        box = self.draw_box(picture.size)
        choices = self._crop.interpolation
        mode = random.choice(choices) if isinstance(choices, tuple) else choices
        flipped = random.random() < self._flip.p
        part = picture.crop(box, (width, height))
        if mode.value not in _BY_TORCH:
            resized = Image.fromarray(part).resize((width, height), str_to_pil_interp(mode.value))
            return pixels_of(resized).flip(1) if flipped else pixels_of(resized)
        planes = torch.from_numpy(part).permute(2, 0, 1)[None]
        result = torch.nn.functional.interpolate(planes, (height, width), mode=mode.value, antialias=True)
        return (result.flip(3) if flipped else result)[0].permute(1, 2, 0)

    def draw_box(self, size: tuple[int, int]) -> Box:
        """Draw the crop of a picture of that width and height: Inception's, as timm does, but without the picture.

        Up to ten draws of a share of the area and an aspect ratio (evenly on the logarithmic scale) until the box fits;
        then the largest centred one whose aspect ratio is in the range.
        """
        width, height = size
        for _ in range(10):
            area = random.uniform(*self._crop.scale) * (width * height)
            aspect = math.exp(random.uniform(*self._logarithms))
            box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if box_width <= width and box_height <= height:
                top = random.randint(0, height - box_height)
                return Box(random.randint(0, width - box_width), top, box_width, box_height)
        least, most = self._crop.ratio
        box_width = round(height * most) if width / height > most else width
        box_height = round(width / least) if width / height < least else height
        return Box((width - box_width) // 2, (height - box_height) // 2, box_width, box_height)

    def __repr__(self) -> str:
        """Return the two steps."""
        return f"{self._crop}, {self._flip}"


class Whole:
    """Steps on the whole decoded picture: those of evaluation, to the last bit timm's."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = tuple(steps)

    def __call__(self, picture: Picture) -> Tensor:
        """Return uint8 ``[H, W, 3]``, or ``[H, W, 1]`` after a step to grey."""
        image = picture.whole()
        for step in self._steps:
            image = step(image)
        return pixels_of(image)

    def __repr__(self) -> str:
        """Return the steps."""
        return ", ".join(map(str, self._steps))


class Normalise:
    """timm's last two steps, scaling to [0, 1] and normalising, on whole rows of pixels.

    Args:
        width: pixels in a row.
        mean, std: of each channel.
        exact: by timm's own operations, to the last bit; else by one product and one sum, in half the time, within
            4e-7 of the largest value.
    """

    def __init__(self, width: int, mean: Sequence[float], std: Sequence[float], *, exact: bool) -> None:
        self._told = f"Normalise(mean={tuple(mean)}, std={tuple(std)})"
        self._exact = exact
        self._mean = torch.tensor(mean, dtype=torch.float32).repeat(width)
        self._std = torch.tensor(std, dtype=torch.float32).repeat(width)
        self._scale = (1 / (255 * self._std.double())).float()
        self._bias = (-self._mean.double() / self._std.double()).float()

    def __call__(self, pixels: Tensor, out: Tensor) -> None:
        """Write uint8 ``[H, W, C]`` as float32 into ``out`` of that shape, contiguous."""
        out.copy_(pixels)
        rows = out.view(len(out), -1)
        if self._exact:
            rows.div_(255).sub_(self._mean).div_(self._std)
        else:
            torch.addcmul(self._bias, rows, self._scale, out=rows)

    def __repr__(self) -> str:
        """Return the statistics."""
        return self._told


def pixels_of(image: Image.Image) -> Tensor:
    """Return a copy of an 8-bit picture's pixels, uint8 ``[H, W, C]``."""
    pixels = torch.from_numpy(np.array(image))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _at_least_two_pixels(image: Image.Image) -> Image.Image:
    """Double a side of one pixel, of which a random crop could take none."""
    return image.resize((max(image.width, 2), max(image.height, 2)), Image.Resampling.NEAREST)
