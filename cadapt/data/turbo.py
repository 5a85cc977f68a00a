"""Decodes baseline JPEGs by the optional package simplejpeg, straight into an array, in four fifths of Pillow's time.

Both are libjpeg-turbo underneath and give the same pixels, so it does not matter to a run which of them decodes. Used
by :mod:`cadapt.data.encoded`; what simplejpeg does not take is left to Pillow, which then says why. Imports no torch.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import numpy.typing as npt

from cadapt.data.jpeg import Frame, with_height

AVAILABLE = importlib.util.find_spec("simplejpeg") is not None


def decode_rows(data: bytes, frame: Frame, rows: int, scale: int) -> npt.NDArray[np.uint8] | None:
    """Decode the first rows of a colour JPEG, reduced by 1, 2, 4 or 8.

    Args:
        rows: how many, in pixels of the whole.

    Returns:
        RGB ``[ceil(rows / scale), ceil(width / scale), 3]``, or None where simplejpeg is missing or refuses the file.
    """
    if not AVAILABLE:
        return None
    from simplejpeg import decode_jpeg  # type: ignore[import-not-found,import-untyped,unused-ignore]

    try:
        # Not strict: the rows left out are bytes too many, and of damaged data Pillow shows what there is.
        pixels: npt.NDArray[np.uint8] = decode_jpeg(
            with_height(data, frame, rows),
            min_height=-(-rows // scale),
            min_width=-(-frame.width // scale),
            min_factor=scale,
            strict=False,
        )
    except ValueError:
        return None
    return pixels
