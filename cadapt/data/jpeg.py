"""Finds what a JPEG's header says about its size, and cuts the picture off below a given row before it is decoded.

A decoder works from the top down, so what lies below a crop need not be decoded at all. Used by
:mod:`cadapt.data.encoded` for baseline files; all others are decoded whole. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

_BASELINE_FRAME, _START_OF_SCAN = 0xC0, 0xDA
# tables, restart interval, comment, JFIF's own segment and the colour profile's
_SILENT = frozenset((0xC4, 0xDB, 0xDD, 0xFE, 0xE0, 0xE2))
_END_OF_IMAGE = b"\xff\xd9"
_ROWS_BEYOND = 4


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What a baseline JPEG's header says.

    Args:
        offset: of the two bytes of the height, from the start of the file.
        width, height: of the picture, in pixels.
        plain: three components of 8 bits, and nothing in the header that may say which side is up.
    """

    offset: int
    width: int
    height: int
    plain: bool

    def rows_for(self, bottom: int) -> int:
        """Return how many rows to decode so that those above ``bottom`` come out as they would from all.

        Chroma of half the height is interpolated from the next row of chroma, too: two rows of pixels further down.
        Where an eighth of the size is decoded, the edge may be rounded four rows down.
        """
        return min(bottom + _ROWS_BEYOND, self.height)


def find_frame(data: bytes) -> Frame | None:
    """Return the frame header of a baseline JPEG that ends as one should; None for any other file.

    Laid out as in ITU-T T.81, annex B.2: markers with lengths up to the start of the first scan. A file whose end is
    missing is not for us: whoever decodes all of it finds that out.
    """
    if not data.endswith(_END_OF_IMAGE):
        return None
    place, silent, frame = 2, data.startswith(b"\xff\xd8"), -1
    while place + 10 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == _START_OF_SCAN:
            return None if frame < 0 else _frame_at(data, frame, silent)
        if not 0xC0 <= marker <= 0xFE or (marker == _BASELINE_FRAME and frame >= 0):
            return None
        if marker == _BASELINE_FRAME:
            frame = place
        else:  # notes may come after the frame, too
            silent = silent and marker in _SILENT
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


def _frame_at(data: bytes, place: int, silent: bool) -> Frame:
    # after the marker: length (2 bytes), precision (1), height (2), width (2), components (1)
    precision, components = data[place + 4], data[place + 9]
    height, width = (int.from_bytes(data[start : start + 2], "big") for start in (place + 5, place + 7))
    plain = silent and precision == 8 and components == 3 and height > 0 and width > 0
    return Frame(offset=place + 5, width=width, height=height, plain=plain)


def with_height(data: bytes, frame: Frame, rows: int) -> bytes | bytearray:
    """Return the file with another height in its header: decoders stop there, and are content."""
    if rows == frame.height:
        return data
    changed = bytearray(data)
    changed[frame.offset : frame.offset + 2] = rows.to_bytes(2, "big")
    return changed
