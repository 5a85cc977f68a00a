"""The per-layer chart: where in the network adapters fold, and what decided it.

A table whose cells hold bars, so that five sites and sixty read alike, on a wide screen and on a telephone, and that
who hears the page hears its figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cadapt.report import figures
from cadapt.report.merge_rows import size_of
from cadapt.report.page.markup import Markup, element, joined
from cadapt.report.page.scale import Scale, percent_of, scale_of
from cadapt.report.page.statuses import mark, status_legend

if TYPE_CHECKING:
    from cadapt.merging.report import SiteMerge

_HEIGHT = 12
_LONGEST_NAME = 44


@dataclass(frozen=True, kw_only=True)
class _Measure:
    title: str
    about: str
    read: Callable[[SiteMerge], float | None]
    written: Callable[[float | None], str] = figures.plain
    most: float | None = None

    def value(self, row: SiteMerge) -> float | None:
        found = self.read(row)
        return found if found is not None and math.isfinite(found) else None

    def scale(self, rows: Sequence[SiteMerge]) -> Scale:
        found = [value for row in rows if (value := self.value(row)) is not None]
        return scale_of([0.0, self.most or max(*found, 0.0)], most=4, floor=0)


_MEASURES = (
    _Measure(title="R²", about="of the best kernel", read=lambda row: row.r2, written=figures.fixed, most=1.0),
    _Measure(
        title="‖Δ‖/‖h‖",
        about="how much it adds",
        read=size_of,
    ),
    _Measure(title="‖ΔW‖/‖W‖", about="change of the weights", read=lambda row: row.relative_update),
    _Measure(
        title="MACs saved",
        about="of one image",
        read=lambda row: float(row.macs_before - row.macs_after),
        written=lambda value: figures.NONE if value is None else figures.rounded(value),
    ),
)


def layers_chart(rows: Sequence[SiteMerge]) -> Markup:
    """Return the chart of at least one site, in the order of the network, and its legend."""
    shown = [measure for measure in _MEASURES if any(measure.value(row) is not None for row in rows)]
    scales = [measure.scale(rows) for measure in shown]
    titles = (element("th", measure.title, element("span", measure.about), scope="col") for measure in shown)
    head = element("thead", element("tr", element("th", "site", scope="col"), *titles))
    body = element("tbody", joined(_row(row, shown, scales) for row in rows))
    caption = element("caption", "Each adapter in the order of the network")
    return joined((status_legend(rows), element("table", caption, head, body, class_="layers")))


def _row(row: SiteMerge, shown: Sequence[_Measure], scales: Sequence[Scale]) -> Markup:
    name = element("span", shorten(row.site), class_="code", title=row.site)
    hidden = element("span", f" ({row.status})", class_="heard")
    cells = (
        element("td", _bar(measure.value(row), measure, scale)) for measure, scale in zip(shown, scales, strict=True)
    )
    return element("tr", element("th", mark(row.status), name, hidden, scope="row"), *cells, class_=f"s-{row.status}")


def shorten(name: str) -> str:
    """A name with its middle left out where it is too long for a chart; first and last words tell most.

    >>> shorten("stages.0.blocks.1.conv"), len(shorten("a" * 90))
    ('stages.0.blocks.1.conv', 44)
    """
    if len(name) <= _LONGEST_NAME:
        return name
    tail = _LONGEST_NAME * 3 // 5
    return f"{name[: _LONGEST_NAME - tail - 1]}…{name[-tail:]}"


def _bar(value: float | None, measure: _Measure, scale: Scale) -> Markup:
    length = percent_of(0.0 if value is None else scale.share(value))
    bar = element(
        "svg",
        element("rect", x=0, y=0, width="100%", height=_HEIGHT, class_="track"),
        element("rect", x=0, y=1, width=length, height=_HEIGHT - 2, class_="fill") if value else Markup(""),
        joined(
            element("line", x1=percent_of(at), x2=percent_of(at), y1=0, y2=_HEIGHT, class_="grid")
            for at in map(scale.share, scale.ticks)
        ),
        width="100%",
        height=_HEIGHT,
        aria_hidden="true",
    )
    return element("div", bar, element("span", measure.written(value)), class_="bar")
