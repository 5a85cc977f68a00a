"""Finds what a JPEG's header says about its rows, and cuts the picture off below a given one before it is decoded.

A decoder works from the top down, so what lies below a crop need not be decoded at all. Used by
:mod:`cadapt.data.encoded` for baseline files; all others are decoded whole. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

_BASELINE_FRAME, _START_OF_SCAN = 0xC0, 0xDA
_END_OF_IMAGE = b"\xff\xd9"
_ROWS_BEYOND = 4


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Where a baseline JPEG's header holds its height, and what it holds there.

    Args:
        offset: of the two bytes of the height, from the start of the file.
        height: of the picture, in pixels.
    """

    offset: int
    height: int

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
    place = 2
    while place + 10 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == _BASELINE_FRAME:
            # after the marker: length (2 bytes), precision (1), height (2), width (2), components
            height = int.from_bytes(data[place + 5 : place + 7], "big")
            return Frame(offset=place + 5, height=height)
        if marker == _START_OF_SCAN or not 0xC0 <= marker <= 0xFE:
            return None
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None
