"""The figures that a page opens with: a label, a number large enough to be read across a table, where it came from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from cadapt.report.page.markup import Markup, element, joined

Tone = Literal["plain", "good", "bad"]


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One figure: ``value`` is what counts, ``detail`` what it is to be judged against."""

    label: str
    value: str
    detail: str = ""
    tone: Tone = "plain"


def tiles(found: Iterable[Tile]) -> Markup:
    """Return the figures side by side, as many in a line as there is room for."""
    return element("ul", joined(map(_tile, found)), class_="tiles")


def badges(found: Iterable[tuple[str, Tone]]) -> Markup:
    """Short judgements in a frame each; their words carry them, the colour only repeats them."""
    return element("ul", joined(element("li", said, class_=tone) for said, tone in found), class_="badges")


def _tile(tile: Tile) -> Markup:
    parts = (
        element("span", tile.label, class_="label"),
        element("span", tile.value, class_="value"),
        element("span", tile.detail, class_="detail"),
    )
    return element("li", *parts, class_=tile.tone)
