"""How the status of an adapter is shown: a shape, a colour and its word, the same in every part of a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cadapt.report.page.markup import Markup, element, joined
from cadapt.report.page.scale import percent_of

if TYPE_CHECKING:
    from cadapt.merging.report import SiteMerge

ORDER = ("exact", "fitted", "dropped", "simplified", "kept", "refused")
MEANINGS: Mapping[str, str] = {
    "exact": "folded into the base's layer, computes the same",
    "fitted": "a fitted kernel in the base's layers stands in for it",
    "dropped": "left out, nothing stands in for it",
    "simplified": "stays, in a cheaper form that computes the same",
    "kept": "stays as it was",
    "refused": "stays: a merge was computed and failed its check",
}
# drawn about 0, 0 within 5 to each side
_SHAPES: Mapping[str, Markup] = {
    "exact": element("circle", r="4.5", class_="solid"),
    "fitted": element("path", d="M0-5.5 5.5 0 0 5.5-5.5 0Z", class_="solid"),
    "dropped": element("circle", r="3.75", class_="line"),
    "simplified": element("path", d="M0-5 5.2 4.5-5.2 4.5Z", class_="solid"),
    "kept": element("rect", x=-4, y=-4, width=8, height=8, class_="solid"),
    "refused": element("path", d="M-4-4 4 4M4-4-4 4", class_="line"),
}
_STRIP_HEIGHT, _STAYS_HEIGHT = 30, 13
_GONE = frozenset(("exact", "fitted", "dropped"))


def mark(status: str) -> Markup:
    """The shape of a status, to stand beside its word."""
    return mark_of(_SHAPES[status], f"s-{status}")


def mark_of(shape: Markup, kind: str) -> Markup:
    """A shape around 0, 0 as a sign within a line of text, which says the same in words."""
    box = "-6.5 -6.5 13 13"
    return element("svg", shape, class_=f"mark {kind}", width=13, height=13, viewBox=box, aria_hidden="true")


def status_cell(status: str) -> Markup:
    """Shape and word."""
    return element("span", mark(status), status, class_="status")


def status_legend(rows: Sequence[SiteMerge]) -> Markup:
    """The statuses that occur, how often, and what they mean."""
    counts = {status: sum(row.status == status for row in rows) for status in ORDER}
    entries = (
        element("li", mark(status), element("b", f"{count} {status}"), f" {MEANINGS[status]}")
        for status, count in counts.items()
        if count
    )
    return element("ul", joined(entries), class_="legend")


def strip(rows: Sequence[SiteMerge]) -> Markup:
    """The network from input to output, a cell for each adapter: high where it is gone, low where it stays."""
    said = ", ".join(f"{row.site}: {row.status}" for row in rows)
    return element(
        "svg",
        element("title", "What became of each adapter, from the input to the output", id="strip-title"),
        element("desc", said, id="strip-said"),
        joined(_strip_cell(at, len(rows), row) for at, row in enumerate(rows)),
        element("line", x1=0, x2="100%", y1=_STRIP_HEIGHT + 1, y2=_STRIP_HEIGHT + 1, class_="axis"),
        element("text", "input", x=0, y=_STRIP_HEIGHT + 16),
        element("text", "output", x="100%", y=_STRIP_HEIGHT + 16, text_anchor="end"),
        class_="strip",
        width="100%",
        height=_STRIP_HEIGHT + 20,
        role="img",
        aria_labelledby="strip-title strip-said",
    )


def _strip_cell(at: int, count: int, row: SiteMerge) -> Markup:
    height = _STRIP_HEIGHT if row.status in _GONE else _STAYS_HEIGHT
    return element(
        "rect",
        element("title", f"{row.site}: {row.status}"),
        class_=f"cell s-{row.status}",
        x=percent_of(at / count),
        y=_STRIP_HEIGHT - height,
        width=percent_of(1 / count),
        height=height,
    )
