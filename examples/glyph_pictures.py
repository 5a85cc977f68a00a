"""Pictures of printed characters, drawn from fonts and distorted at random: what ``pretrain_glyphs.py`` learns from.

Each character of each font is drawn once as a mask; every batch then warps, thickens, blurs, colours and dirties masks
picked at random, all in torch, so that no two pictures are alike and no data set has to be fetched.
"""

from __future__ import annotations

import importlib.util
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from PIL import Image, ImageDraw, ImageFont

MASK_SIZE = 48
"""Side of a drawn mask in pixels."""

FONT_FILES = (
    *("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf", "DejaVuSans-BoldOblique.ttf"),
    *("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf", "DejaVuSansMono-Oblique.ttf", "DejaVuSansMono-BoldOblique.ttf"),
    *("DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSerif-Italic.ttf", "DejaVuSerif-BoldItalic.ttf"),
    *("STIXGeneral.ttf", "STIXGeneralBol.ttf", "STIXGeneralItalic.ttf", "STIXGeneralBolIta.ttf"),
    *("cmr10.ttf", "cmb10.ttf", "cmss10.ttf", "cmtt10.ttf", "cmti10.ttf"),
)
"""The text fonts that matplotlib's package carries; the rest of its folder holds mathematical pieces."""

HELD_OUT_FONT_FILES = ("DejaVuSerif-Italic.ttf", "STIXGeneralBol.ttf", "cmss10.ttf")
"""Fonts that training never sees: what the accuracy on unseen fonts is measured on."""

CLASSES: tuple[str, ...] = (
    *string.ascii_letters,
    *"!#$%&()*+/<=>?@[]{}",
    *"ΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπρστφχψω",
    *"БГДЖЗИЙЛПУФЦЧШЩЪЫЭЮЯбвгджзийклмнптфцчшщъыьэюя",
)
"""Letters of three scripts and symbols, but no digit: the digits of the quickstart are new to the backbone."""


def find_font_folder() -> Path:
    """Return the folder of the fonts inside the installed matplotlib package, which is not imported.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    package = importlib.util.find_spec("matplotlib")
    if package is None or package.origin is None:
        raise SystemExit("error: the fonts come with matplotlib, which is not installed: try: pip install matplotlib")
    return Path(package.origin).parent / "mpl-data" / "fonts" / "ttf"


def draw_mask(character: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """Return the character drawn white on black in the middle of a ``[MASK_SIZE, MASK_SIZE]`` uint8 array."""
    picture = Image.new("L", (MASK_SIZE, MASK_SIZE))
    ImageDraw.Draw(picture).text((MASK_SIZE / 2, MASK_SIZE / 2), character, fill=255, font=font, anchor="mm")
    left, top, right, bottom = picture.getbbox() or (0, 0, MASK_SIZE, MASK_SIZE)
    centred = Image.new("L", (MASK_SIZE, MASK_SIZE))
    centred.paste(
        picture.crop((left, top, right, bottom)), ((MASK_SIZE - right + left) // 2, (MASK_SIZE - bottom + top) // 2)
    )
    return np.asarray(centred)


@dataclass(frozen=True, kw_only=True)
class GlyphMasks:
    """Every character in every font: ``masks`` is ``[N, MASK_SIZE, MASK_SIZE]`` uint8, ``labels`` ``[N]`` classes."""

    masks: torch.Tensor
    labels: torch.Tensor


def draw_masks(folder: Path, font_files: Sequence[str]) -> GlyphMasks:
    """Draw all of ``CLASSES`` in the given fonts, leaving out what a font has no drawing for.

    Raises:
        OSError: a font file is missing.
    """
    masks, labels = [], []
    for font_file in font_files:
        font = ImageFont.truetype(folder / font_file, size=round(MASK_SIZE * 0.8))
        missing = draw_mask("\uffff", font)
        for label, character in enumerate(CLASSES):
            mask = draw_mask(character, font)
            if mask.any() and not np.array_equal(mask, missing):
                masks.append(mask)
                labels.append(label)
    return GlyphMasks(masks=torch.from_numpy(np.stack(masks)), labels=torch.tensor(labels))


def uniform(shape: Sequence[int], low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    """Return float32 numbers drawn evenly from ``[low, high)``."""
    return torch.rand(tuple(shape), generator=generator) * (high - low) + low


def change_thickness(masks: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Thin, keep or thicken the strokes of ``[B, 1, S, S]`` masks in [0, 1] by up to a pixel on either side."""
    thick = functional.max_pool2d(masks, kernel_size=3, stride=1, padding=1)
    thin = -functional.max_pool2d(-masks, kernel_size=3, stride=1, padding=1)
    amount = uniform((len(masks), 1, 1, 1), -0.6, 1.0, generator)
    return masks + amount.clamp(min=0) * (thick - masks) + (-amount).clamp(min=0) * (thin - masks)


def warp(masks: torch.Tensor, image_size: int, generator: torch.Generator) -> torch.Tensor:
    """Turn, stretch, shear, move and bend ``[B, 1, S, S]`` masks, and sample them at ``image_size``."""
    count = len(masks)
    angle, shear = uniform((count,), -0.3, 0.3, generator), uniform((count,), -0.35, 0.35, generator)
    width, height = uniform((count,), 0.6, 1.25, generator), uniform((count,), 0.6, 1.0, generator)
    shift = uniform((count, 2), -0.12, 0.12, generator)
    rows = torch.stack(
        [
            torch.stack([angle.cos() * width, -(angle + shear).sin() * height, shift[:, 0]], dim=1),
            torch.stack([angle.sin() * width, (angle + shear).cos() * height, shift[:, 1]], dim=1),
        ],
        dim=1,
    )
    grid = functional.affine_grid(rows, [count, 1, image_size, image_size], align_corners=False)
    strength = uniform((count, 1, 1, 1), 0.0, 0.12, generator)
    bends = torch.randn((count, 2, 4, 4), generator=generator) * strength
    bends = functional.interpolate(bends, size=(image_size, image_size), mode="bicubic", align_corners=False)
    return functional.grid_sample(masks, grid + bends.permute(0, 2, 3, 1), align_corners=False)


def lower_resolution(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shrink the whole batch ``[B, 1, S, S]`` to a random smaller size and back for a random third of it."""
    side = int(torch.randint(10, pictures.shape[-1], (1,), generator=generator))
    coarse = functional.interpolate(pictures, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    coarse = functional.interpolate(coarse, size=pictures.shape[-2:], mode="bilinear", align_corners=False)
    return torch.where(uniform((len(pictures), 1, 1, 1), 0.0, 1.0, generator) < 1 / 3, coarse, pictures)


def colour(masks: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Paint ``[B, 1, S, S]`` masks in one colour over a shaded background of another: ``[B, 3, S, S]`` in [0, 1]."""
    count, side = len(masks), masks.shape[-1]
    dark = uniform((count, 1, 1, 1), 0.0, 0.45, generator) + uniform((count, 3, 1, 1), -0.15, 0.15, generator)
    light = uniform((count, 1, 1, 1), 0.6, 1.0, generator) + uniform((count, 3, 1, 1), -0.15, 0.15, generator)
    swapped = uniform((count, 1, 1, 1), 0.0, 1.0, generator) < 0.5
    ink, paper = torch.where(swapped, dark, light), torch.where(swapped, light, dark)
    slope = torch.linspace(-1, 1, side)
    shade = uniform((count, 1, 1, 1), -0.15, 0.15, generator) * slope.view(1, 1, 1, side)
    shade = shade + uniform((count, 1, 1, 1), -0.15, 0.15, generator) * slope.view(1, 1, side, 1)
    noise = torch.randn((count, 3, side, side), generator=generator) * uniform((count, 1, 1, 1), 0.0, 0.08, generator)
    return (paper + shade + (ink - paper) * masks + noise).clamp(0, 1)


def make_batch(
    glyphs: GlyphMasks, count: int, image_size: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``count`` new pictures ``[count, 3, image_size, image_size]`` in [-1, 1] and their classes ``[count]``."""
    picked = torch.randint(len(glyphs.masks), (count,), generator=generator)
    masks = glyphs.masks[picked].unsqueeze(1).float() / 255
    masks = warp(change_thickness(masks, generator), image_size, generator)
    return colour(lower_resolution(masks, generator), generator) * 2 - 1, glyphs.labels[picked]
