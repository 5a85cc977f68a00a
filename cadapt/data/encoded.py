"""Holds a picture that is opened but not decoded yet, so that a crop can be chosen first and little else be decoded.

:class:`~cadapt.data.folder.Images` hands these to the transforms of training, which know from the header's size where
they will crop. Everything that is no plain JPEG is decoded whole by :mod:`cadapt.data.images`. Imports no torch.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile

from cadapt.data import turbo
from cadapt.data.images import UPRIGHT, guarded, load_pixels, open_bytes, orientation_of, read_file, to_rgb
from cadapt.data.jpeg import Frame, find_frame, with_height

Pixels = npt.NDArray[np.uint8]

_SCALES = (8, 4, 2)  # that both libjpeg's fast inverse transforms and Pillow's draft mode know
_COLOURS = ("RGB", "L", "CMYK")


class Box(NamedTuple):
    """A part of a picture, in pixels of the upright whole."""

    left: int
    top: int
    width: int
    height: int


class Picture(Protocol):
    """What a transform crops."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the upright whole, in pixels."""

    def whole(self) -> Image.Image:
        """Decode all of it, as :func:`~cadapt.data.images.read_image` does. Raises: UnreadableImage."""

    def crop(self, box: Box, at_least: tuple[int, int]) -> Pixels:
        """Decode one part as RGB ``[height, width, 3]``, perhaps reduced, but to no less than ``at_least``.

        That is (width, height). Raises: UnreadableImage.
        """


class DecodedPicture:
    """A :class:`Picture` in memory: upright RGB."""

    def __init__(self, image: Image.Image) -> None:
        self._image = image

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, in pixels."""
        return self._image.size

    def whole(self) -> Image.Image:
        """Return the picture."""
        return self._image

    def crop(self, box: Box, at_least: tuple[int, int]) -> Pixels:
        """Return a copy of one part in full size."""
        return np.array(self._image.crop((box.left, box.top, box.left + box.width, box.top + box.height)))


class EncodedPicture:
    """A :class:`Picture` still in its file's bytes.

    A crop at least twice, four or eight times as large as needed is decoded from so much smaller cosine transforms
    (Pillow's draft mode): its edges are then rounded to whole pixels of the reduced picture, half a pixel of the
    result at most. Crops in full size have the very pixels of :meth:`whole`.

    Args:
        data: the file's bytes.
        name: for errors.

    Raises:
        UnreadableImage: not a picture, or too large to be decoded safely.
    """

    def __init__(self, data: bytes, name: str) -> None:
        self._data = data
        self._name = name
        self._frame = find_frame(data)
        # Where the header is this simple, it need not be read once more to be cropped by.
        self._image = None if _is_plain(self._frame) else self._opened()
        self._orientation = 1 if self._image is None or not _by_parts(self._image) else orientation_of(self._image)
        self._whole: Image.Image | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the upright whole, in pixels."""
        if self._image is None and self._frame is not None:
            return self._frame.width, self._frame.height
        if self._image is None or not _by_parts(self._image):
            return self.whole().size
        width, height = self._image.size
        return (height, width) if self._orientation >= 5 else (width, height)

    def whole(self) -> Image.Image:
        """Decode all of it. Raises: UnreadableImage."""
        if self._whole is None:
            image = self._opened()
            self._whole = guarded(lambda: to_rgb(image), self._name)
        return self._whole

    def crop(self, box: Box, at_least: tuple[int, int]) -> Pixels:
        """Decode one part as RGB ``[height, width, 3]``, perhaps reduced. Raises: UnreadableImage."""
        if self._image is not None and not _by_parts(self._image):
            return DecodedPicture(self.whole()).crop(box, at_least)
        orientation = self._orientation
        width, height = self.size if orientation < 5 else self.size[::-1]
        stored = _as_stored(box, (width, height), orientation)
        needed = at_least if orientation < 5 else at_least[::-1]
        scale = next((s for s in _SCALES if s * needed[0] <= stored.width and s * needed[1] <= stored.height), 1)
        part = self._part_by_turbo(stored, scale)
        if part is None:
            part = np.array(guarded(lambda: self._part_by_pillow(stored, scale), self._name))
        return np.array(Image.fromarray(part).transpose(UPRIGHT[orientation])) if orientation in UPRIGHT else part

    def _opened(self) -> Image.Image:
        return guarded(lambda: open_bytes(io.BytesIO(self._data)), self._name)

    def _part_by_turbo(self, stored: Box, scale: int) -> Pixels | None:
        if self._frame is None or (self._image is not None and self._image.mode != "RGB"):
            return None
        rows = turbo.decode_rows(self._data, self._frame, self._frame.rows_for(stored.top + stored.height), scale)
        if rows is None:
            return None
        left, top, right, bottom = _reduced(stored, scale, (rows.shape[1], rows.shape[0]))
        return rows[top:bottom, left:right]

    def _part_by_pillow(self, stored: Box, scale: int) -> Image.Image:
        data: bytes | bytearray = self._data
        if self._frame is not None:
            data = with_height(self._data, self._frame, self._frame.rows_for(stored.top + stored.height))
        image = open_bytes(io.BytesIO(data))
        assert isinstance(image, ImageFile.ImageFile)  # noqa: S101  (Pillow opens nothing else)
        image.decodermaxblock = len(data)  # all at once, where Pillow would hand over 64 KB at a time
        if scale > 1:
            width, height = image.size
            image.draft(image.mode, (max(width // scale, 1), max(height // scale, 1)))
        load_pixels(image)
        part = image.crop(_reduced(stored, scale, image.size))
        return part if part.mode == "RGB" else part.convert("RGB")


def open_picture(path: str | Path) -> EncodedPicture:
    """Open the picture in a file; only its header is looked at. Raises: UnreadableImage."""
    return EncodedPicture(read_file(path), str(path))


def _is_plain(frame: Frame | None) -> bool:
    """Tell whether a header says all there is to know, and nothing that Pillow would stop at."""
    limit = Image.MAX_IMAGE_PIXELS
    return frame is not None and frame.plain and (limit is None or frame.width * frame.height <= limit)


def _by_parts(image: Image.Image) -> bool:
    # Of the other formats, some know where up is only once they are decoded.
    return image.format == "JPEG" and image.mode in _COLOURS


def _as_stored(box: Box, size: tuple[int, int], orientation: int) -> Box:
    """Return where a part of the upright picture lies in the stored one, of that size and EXIF orientation."""
    left, top, width, height = (box.top, box.left, box.height, box.width) if orientation >= 5 else box
    if orientation in (2, 3, 7, 8):
        left = size[0] - left - width
    if orientation in (3, 4, 6, 7):
        top = size[1] - top - height
    return Box(left, top, width, height)


def _reduced(box: Box, scale: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return a part's edges in the picture that was reduced by ``scale`` to ``size``."""
    # halves go up, all of them: were some to go down, a part could lose a pixel of what was asked for
    edges = box.left, box.top, box.left + box.width, box.top + box.height
    left, top, right, bottom = ((edge + scale // 2) // scale for edge in edges)
    return left, top, min(right, size[0]), min(bottom, size[1])
