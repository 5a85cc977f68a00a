"""Panels of a plot: one quantity each over an axis that they share, one below the other.

Each is an SVG of its own, as wide as the window: places along it are shares, heights and letters are in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cadapt.report.page.markup import Markup, element, joined
from cadapt.report.page.scale import Scale, percent_of

TOP, BOTTOM = 26, 40
_INSET = 0.03


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A panel: its name on the page, what it shows, and its axis with how a figure on it is written.

    ``height`` is that of the drawing in pixels, ``above`` more room over it, for labels.
    """

    identity: str
    title: str
    description: str
    scale: Scale
    written: Callable[[float], str]
    height: int = 120
    above: int = 0

    @property
    def top(self) -> int:
        """Where the drawing begins, in pixels from the panel's upper edge."""
        return TOP + self.above

    def y(self, value: float) -> str:
        """The height at which a figure stands, in pixels from the panel's upper edge."""
        return f"{self.top + self.height * (1 - self.scale.share(value)):.2f}"


def x_of(across: Scale, value: float) -> str:
    """Where a figure stands along a panel, a little away from its ends."""
    return percent_of(_INSET + (1 - 2 * _INSET) * across.share(value))


def draw(panel: Panel, across: Scale, *marks: Markup, behind: Markup, label: str = "") -> Markup:
    """Return a panel.

    Args:
        panel: what it shows.
        across: the axis that the panels share.
        marks: what is drawn in it.
        behind: what is drawn below its lines.
        label: of the axis across, which only the lowest panel names.
    """
    names = f"{panel.identity}-title", f"{panel.identity}-said"
    svg = element(
        "svg",
        element("title", panel.title, id=names[0]),
        element("desc", panel.description, id=names[1]),
        behind,
        element("text", panel.title, x=0, y=12, class_="strong"),
        joined(_line(panel, tick) for tick in panel.scale.ticks),
        _axis_across(panel, across, label) if label else Markup(""),
        *marks,
        width="100%",
        height=panel.top + panel.height + (BOTTOM if label else 6),
        role="img",
        aria_labelledby=" ".join(names),
    )
    return element("div", svg, class_="plot")


def _line(panel: Panel, tick: float) -> Markup:
    height = panel.y(tick)
    line = element("line", x1=0, x2="100%", y1=height, y2=height, class_="grid")
    return joined((line, element("text", panel.written(tick), x=-8, y=height, dy=4, text_anchor="end", class_="tick")))


def _axis_across(panel: Panel, across: Scale, label: str) -> Markup:
    foot = panel.top + panel.height
    ticks = (
        element("text", f"{tick:g}", x=x_of(across, tick), y=foot + 16, text_anchor="middle", class_="tick")
        for tick in across.ticks
    )
    name = element("text", label, x="100%", y=foot + 34, text_anchor="end")
    return joined((element("line", x1=0, x2="100%", y1=foot, y2=foot, class_="axis"), *ticks, name))
