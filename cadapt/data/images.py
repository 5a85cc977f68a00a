"""Reads one picture from a file as 8-bit RGB, or says in one line why it cannot be read.

Everything that turns files into pixels goes through here: the folder and shard readers, the loaders' workers, and the
check that decodes each file once before a run. Imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from cadapt.errors import RefusedError

# What Pillow may take a file for, whatever it is called. EPS, for one, would start an interpreter for its program.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
WHITE = (255, 255, 255, 255)
_TIFF_BITS_PER_SAMPLE, _TIFF_PHOTOMETRIC, _EXIF_ORIENTATION = 258, 262, 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The machine is out of something: no fault of the picture's, so never reported as one.
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_WARNING_FILTERS = threading.Lock()

_Result = TypeVar("_Result")

Progress = Callable[[int, int], None]
"""Called with how many are done and how many there are."""


class UnreadableImage(RefusedError):
    """A file that does not hold a whole picture: which, and why in one line."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(
            f"cannot read image {path}: {reason}", hint="replace the file, or leave it out with --skip-bad"
        )
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel from a worker process whole."""
        return (UnreadableImage, (self.path, self.reason))


@dataclass(frozen=True, kw_only=True)
class BadImage:
    """A file that :func:`check_images` could not decode, and why."""

    path: str
    reason: str


def read_image(path: str | Path) -> Image.Image:
    """Read the picture in a file as RGB, upright by its EXIF orientation.

    Transparent pixels are laid on white, as a page would show them: the colours stored under them are arbitrary. Grey
    pictures of 12 or 16 bits are scaled to 8, where Pillow's own conversion clips them. Of an animation, the first
    frame is read. Colour profiles are not applied.

    Raises:
        UnreadableImage: not a whole picture, too large to be decoded safely, of pixels without an agreed range
            (floating point, 32-bit integers beyond 16 bits), or not to be opened.
    """
    return decode_image(read_file(path), str(path))


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode a picture from its file's bytes, as :func:`read_image` does; ``name`` is for the error."""
    return guarded(lambda: to_rgb(open_bytes(io.BytesIO(data))), name)


def check_image(path: str | Path) -> None:
    """Decode a picture only to see whether it can be: as :func:`read_image`, but faster for JPEG."""
    check_bytes(read_file(path), str(path))


def check_bytes(data: bytes, name: str) -> None:
    """Decode a picture's bytes only to see whether it can be done; ``name`` is for the error."""

    def check() -> Image.Image:
        image = open_bytes(io.BytesIO(data))
        if image.format != "JPEG":
            return to_rgb(image)
        # An eighth of the size: the whole file is still parsed, so a missing end is still found.
        image.draft("RGB", (1, 1))
        load_pixels(image)
        return image

    guarded(check, name)


def check_images(paths: Sequence[str | Path], workers: int = 0, on_progress: Progress | None = None) -> list[BadImage]:
    """Decode every file once and return those that cannot be, in the order given.

    Args:
        workers: threads; 0 decodes in the caller's. Pillow decodes outside Python's lock, so threads are enough.
        on_progress: called now and then with how many are done and how many there are.
    """
    return [bad for _, bad in check_each(len(paths), lambda index: check_image(paths[index]), workers, on_progress)]


def check_each(
    count: int, check: Callable[[int], None], workers: int = 0, on_progress: Progress | None = None
) -> list[tuple[int, BadImage]]:
    """Call ``check`` with 0 … ``count - 1`` and return the numbers for which it raised UnreadableImage."""

    def judge(index: int) -> tuple[int, BadImage] | None:
        try:
            check(index)
        except UnreadableImage as error:
            return index, BadImage(path=error.path, reason=error.reason)
        return None

    found = []
    for done, verdict in enumerate(_mapped(judge, count, workers), start=1):
        if verdict is not None:
            found.append(verdict)
        if on_progress is not None and (done % 64 == 0 or done == count):
            on_progress(done, count)
    return found


def _mapped(function: Callable[[int], _Result], count: int, workers: int) -> Iterator[_Result]:
    if workers <= 0:
        yield from map(function, range(count))
        return
    # By portions, so that Ctrl-C waits for one of them and not for a million queued files.
    with ThreadPoolExecutor(max_workers=workers) as pool:
        for start in range(0, count, 64 * workers):
            yield from pool.map(function, range(start, min(start + 64 * workers, count)))


def read_file(path: str | Path) -> bytes:
    """Return a regular file's bytes.

    Raises:
        UnreadableImage: there is no such file, it is no regular file, it is empty, or it may not be read.
    """
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116  (no path object for each of millions)
        if not stat.S_ISREG(mode):  # a pipe would be waited for, forever
            raise UnreadableImage(str(path), "a folder, not a file" if stat.S_ISDIR(mode) else "not a regular file")
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123
            data = file.readall()
    except OSError as error:
        if error.errno in _EXHAUSTED:
            raise
        raise UnreadableImage(str(path), (error.strerror or str(error)).lower()) from error
    if not data:
        raise UnreadableImage(str(path), "the file is empty (0 bytes)")
    return data


def to_rgb(image: Image.Image) -> Image.Image:
    """Bring an open picture of any of Pillow's modes to upright 8-bit RGB; see :func:`read_image`.

    Raises:
        ValueError: its pixels are of a kind that has no agreed range.
    """
    load_pixels(image)
    orientation = orientation_of(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range: save it with 8 or 16 bits per channel")
    if image.mode.startswith("I"):
        image = _grey_to_8_bits(image)
    elif image.has_transparency_data:
        image = _on_white(image)
    upright = image if image.mode == "RGB" else image.convert("RGB")
    return upright.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else upright


def guarded(decode: Callable[[], Image.Image], name: str) -> Image.Image:
    """Return what ``decode`` returns.

    Raises:
        UnreadableImage: it raised anything that is a picture's fault; ``name`` is the picture's.
    """
    try:
        return decode()
    except (UnreadableImage, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(name, f"too large to decode safely: {_first_line(error)}") from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(name, f"not a picture in one of the formats {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's plugins raise nearly everything on damaged files
        raise UnreadableImage(name, _first_line(error)) from error


def open_bytes(file: io.BytesIO) -> Image.Image:
    """Open a picture without decoding it; what Pillow raises is for :func:`guarded`."""
    with _pillow_quiet():
        return Image.open(file, formats=FORMATS)


def load_pixels(image: Image.Image) -> None:
    """Decode an open picture in place; what Pillow raises is for :func:`guarded`."""
    # Only TIFF reads notes, and warns of them, once more after the pixels; the others decode side by side.
    with _pillow_quiet() if image.format == "TIFF" else contextlib.nullcontext():
        image.load()


@contextlib.contextmanager
def _pillow_quiet() -> Iterator[None]:
    """Drop Pillow's remarks on damaged notes, and turn its warning of a huge picture into an error.

    Warning filters belong to the process, not the thread: hence the lock, held where little time is spent.
    """
    with _WARNING_FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def orientation_of(image: Image.Image) -> int:
    """Return an open picture's EXIF orientation, 1 to 8 where it is sound; 1 where there is none."""
    if image.format not in ("JPEG", "MPO", "PNG", "WEBP", "TIFF"):
        return 1
    if image.format in ("JPEG", "MPO") and "exif" not in image.info and "xmp" not in image.info:
        return 1
    try:
        with _pillow_quiet():
            return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # noqa: BLE001
        # Damaged notes beside whole pixels: cameras and editors write those, and every viewer shows such a picture.
        return 1


def _on_white(image: Image.Image) -> Image.Image:
    # Pillow knows the way from premultiplied grey only through plain grey.
    image = image.convert("LA") if image.mode == "La" else image
    layer = image.convert("RGBA")
    page = Image.new("RGBA", layer.size, WHITE)
    page.alpha_composite(layer)
    return page


def _grey_to_8_bits(image: Image.Image) -> Image.Image:
    tags: Any = getattr(image, "tag_v2", {})
    bits = tags.get(_TIFF_BITS_PER_SAMPLE, (16,))
    maximum = 4095 if tuple(bits) == (12,) else 65535
    # ``I;16B`` and its kin carry their byte order in numpy's dtype; 64 bits leave room for the product.
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > maximum:
        raise ValueError(
            f"grey values {values.min()} to {values.max()} are beyond 0 to {maximum}: save it with 16 bits"
        )
    grey = (values * 255 + maximum // 2) // maximum
    if tags.get(_TIFF_PHOTOMETRIC) == 0:  # white is zero, which Pillow minds for 8 bits only
        grey = 255 - grey
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey.astype(np.uint8))
