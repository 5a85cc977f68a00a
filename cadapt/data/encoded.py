"""Holds a picture that is opened but not decoded yet, so that a crop can be chosen first and little else be decoded.

:class:`~cadapt.data.folder.Images` hands these to the transforms of training, which know from the header's size where
they will crop. Everything that is no plain JPEG is decoded whole by :mod:`cadapt.data.images`. Imports no torch.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple, Protocol

from PIL import Image, ImageFile

from cadapt.data.images import UPRIGHT, guarded, load_pixels, open_bytes, orientation_of, read_file, to_rgb
from cadapt.data.jpeg import find_frame

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

    def crop(self, box: Box, at_least: tuple[int, int]) -> Image.Image:
        """Decode one part as RGB, perhaps reduced, but to no less than ``at_least`` (width, height).

        Raises: UnreadableImage.
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

    def crop(self, box: Box, at_least: tuple[int, int]) -> Image.Image:
        """Return one part in full size."""
        return self._image.crop((box.left, box.top, box.left + box.width, box.top + box.height))


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
        self._file = io.BytesIO(data)
        self._image = guarded(lambda: open_bytes(self._file), name)
        self._by_parts = self._image.format == "JPEG" and self._image.mode in _COLOURS
        # Of the other formats, some know where up is only once they are decoded.
        self._orientation = orientation_of(self._image) if self._by_parts else 1
        self._whole: Image.Image | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the upright whole, in pixels."""
        if not self._by_parts:
            return self.whole().size
        width, height = self._image.size
        return (height, width) if self._orientation >= 5 else (width, height)

    def whole(self) -> Image.Image:
        """Decode all of it. Raises: UnreadableImage."""
        if self._whole is None:
            self._whole = guarded(lambda: to_rgb(self._image), self._name)
        return self._whole

    def crop(self, box: Box, at_least: tuple[int, int]) -> Image.Image:
        """Decode one part as RGB, perhaps reduced; once only, and not after :meth:`whole`. Raises: UnreadableImage."""
        if not self._by_parts:
            return DecodedPicture(self.whole()).crop(box, at_least)
        return guarded(lambda: self._decode_part(box, at_least), self._name)

    def _decode_part(self, box: Box, at_least: tuple[int, int]) -> Image.Image:
        image, orientation = self._image, self._orientation
        width, height = reversed(at_least) if orientation >= 5 else at_least
        stored = _as_stored(box, image.size, orientation)
        assert isinstance(image, ImageFile.ImageFile)  # noqa: S101  (Pillow opens nothing else)
        self._leave_out_rows_below(image, stored.top + stored.height)
        scale = next((s for s in _SCALES if s * width <= stored.width and s * height <= stored.height), 1)
        if scale > 1:
            image.draft(image.mode, (image.width // scale, image.height // scale))
        load_pixels(image)
        part = image.crop(_reduced(stored, scale, image.size))
        part = part if part.mode == "RGB" else part.convert("RGB")
        return part.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else part

    def _leave_out_rows_below(self, image: ImageFile.ImageFile, bottom: int) -> None:
        """Write a smaller height into the copy of the file in memory: decoding then ends there, and is content."""
        frame = find_frame(self._data)
        if frame is None or frame.height != image.height:
            return
        rows = frame.rows_for(bottom)
        if rows == frame.height:
            return
        self._file.seek(frame.offset)
        self._file.write(rows.to_bytes(2, "big"))
        image.tile = [image.tile[0]._replace(extents=(0, 0, image.width, rows))]


def open_picture(path: str | Path) -> EncodedPicture:
    """Open the picture in a file; only its header is looked at. Raises: UnreadableImage."""
    return EncodedPicture(read_file(path), str(path))


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
    left, top = round(box.left / scale), round(box.top / scale)
    right, bottom = round((box.left + box.width) / scale), round((box.top + box.height) / scale)
    return left, top, min(right, size[0]), min(bottom, size[1])
