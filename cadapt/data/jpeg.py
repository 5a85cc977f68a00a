"""Finds what a JPEG's header says about its rows, and cuts the picture off below a given one before it is decoded.

A decoder works from the top down, so what lies below a crop need not be decoded at all. Used by
:mod:`cadapt.data.encoded` for baseline files; all others are decoded whole. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

_BASELINE_FRAME, _START_OF_SCAN = 0xC0, 0xDA
_END_OF_IMAGE = b"\xff\xd9"
_BLOCK = 8


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Where a baseline JPEG's header holds its height, and what it holds there.

    Args:
        offset: of the two bytes of the height, from the start of the file.
        height: of the picture, in pixels.
        unit_height: of one row of minimum coded units, in pixels: 8 times the largest vertical sampling factor.
    """

    offset: int
    height: int
    unit_height: int

    def rows_for(self, bottom: int) -> int:
        """Return how many rows to decode so that those above ``bottom`` come out as they would from all.

        Chroma is interpolated across the edges of units, so one row of units more than the crop touches is needed.
        """
        units = -(-bottom // self.unit_height) + 1
        return min(units * self.unit_height, self.height)


def find_frame(data: bytes) -> Frame | None:
    """Return the frame header of a baseline JPEG that ends as one should; None for any other file.

    Laid out as in ITU-T T.81, annex B.2: markers with lengths up to the start of the first scan. A file whose end is
    missing is not for us: whoever decodes all of it finds that out.
    """
    if not data.endswith(_END_OF_IMAGE):
        return None
    place = 2
    while place + 10 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == _BASELINE_FRAME:
            return _frame_at(data, place)
        if marker == _START_OF_SCAN or not 0xC0 <= marker <= 0xFE:
            return None
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


def _frame_at(data: bytes, place: int) -> Frame | None:
    """Read a frame header: length (2 bytes), precision (1), height (2), width (2), components (1), and 3 for each."""
    components = data[place + 9]
    factors = [part & 0x0F for part in data[place + 11 : place + 10 + 3 * components : 3]]
    if not factors or not all(factors):
        return None
    height = int.from_bytes(data[place + 5 : place + 7], "big")
    return Frame(offset=place + 5, height=height, unit_height=_BLOCK * max(factors))
