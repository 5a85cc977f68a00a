"""The frontier: what is lost, and what is won, as one adapter after the other goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cadapt.report.page.markup import Markup, element, joined
from cadapt.report.page.plot import Panel, draw, x_of
from cadapt.report.page.quantities import Quantity, quantities
from cadapt.report.page.scale import Scale, scale_of
from cadapt.report.page.statuses import mark_of

if TYPE_CHECKING:
    from cadapt.merging.report import FrontierPoint, MergeReport

# so many points, and they stand close
_MANY = 24


def frontier_plot(report: MergeReport) -> Markup:
    """Return the panels and their legend; the report has at least one point."""
    across = _across(report.frontier)
    shown = quantities(report)
    panels = [
        _panel(quantity, report.frontier, across, first=quantity is shown[0], last=quantity is shown[-1])
        for quantity in shown
    ]
    return joined((*panels, _legend(report.frontier)))


def _across(points: Sequence[FrontierPoint]) -> Scale:
    counts = [float(point.folded) for point in points]
    if min(counts) == max(counts):
        return Scale(low=counts[0] - 1, high=counts[0] + 1, ticks=(counts[0],), step=1)
    # it ends where the adapters do, not at the next round number
    return scale_of(counts, most=7, least_step=1, floor=min(counts), ceiling=max(counts))


def _panel(quantity: Quantity, points: Sequence[FrontierPoint], across: Scale, *, first: bool, last: bool) -> Markup:
    values, (floor, ceiling) = quantity.of(points), quantity.limits
    bound = [] if quantity.bound is None else [quantity.bound]
    scale = scale_of([*values.values(), *bound], most=5 if quantity.height > 150 else 3, floor=floor, ceiling=ceiling)
    panel = Panel(
        identity=f"frontier-{quantity.identity}",
        title=quantity.title,
        description=f"{quantity.title}, by the number of adapters folded. The table below holds every figure.",
        scale=scale,
        written=quantity.written(scale),
        height=quantity.height,
        above=20 if first else 0,
    )
    behind = _allowed(panel, quantity)
    chosen = next((point for point in points if point.chosen), None)
    marks = (_bound(panel, quantity), _guide(panel, across, chosen, named=first), *_curve(panel, across, values))
    return draw(panel, across, *marks, behind=behind, label="adapters folded beyond the exact ones" if last else "")


def _curve(panel: Panel, across: Scale, values: dict[FrontierPoint, float]) -> list[Markup]:
    way = [(point, value) for point, value in values.items() if not point.refined]
    way.sort(key=lambda found: found[0].folded)
    plain = {point.folded: value for point, value in way}
    lines = [
        _segment(panel, across, (start.folded, low), (end.folded, high), "path")
        for (start, low), (end, high) in zip(way, way[1:], strict=False)
    ]
    lines += [
        _segment(panel, across, (point.folded, plain[point.folded]), (point.folded, value), "faint")
        for point, value in values.items()
        if point.refined and point.folded in plain
    ]
    return [*lines, *(_dot(panel, across, point, value, len(way) > _MANY) for point, value in values.items())]


def _segment(panel: Panel, across: Scale, start: tuple[float, float], end: tuple[float, float], kind: str) -> Markup:
    x1, x2 = x_of(across, start[0]), x_of(across, end[0])
    return element("line", x1=x1, y1=panel.y(start[1]), x2=x2, y2=panel.y(end[1]), class_=kind)


def _dot(panel: Panel, across: Scale, point: FrontierPoint, value: float, small: bool) -> Markup:
    said = f"{point.folded} folded{', refined' if point.refined else ''}: {panel.written(value)}"
    said += f", last {point.site} ({point.action})" if point.site else ""
    shapes = (element("title", said), _shape(point, small))
    ring = element("circle", r=8.5, class_="ring") if point.chosen else Markup("")
    # only a frame can be moved by a share of the width: a path, and what transforms it, knows pixels
    return element(
        "svg", *shapes, ring, x=x_of(across, point.folded), y=panel.y(value), class_=f"point {_colour(point)}"
    )


def _shape(point: FrontierPoint, small: bool = False) -> Markup:
    if point.refined:
        return element("path", d="M0-6 6 0 0 6-6 0Z", class_="solid")
    radius = 2.75 if small else 4.25
    return element("circle", r=radius, class_="line" if point.action == "dropped" else "solid")


def _colour(point: FrontierPoint) -> str:
    return "s-refined" if point.refined else "s-exact"


def _guide(panel: Panel, across: Scale, chosen: FrontierPoint | None, *, named: bool) -> Markup:
    if chosen is None:
        return Markup("")
    place, share = x_of(across, chosen.folded), across.share(chosen.folded)
    top = panel.top - 8 if named else 0
    line = element("line", x1=place, x2=place, y1=top, y2=panel.top + panel.height, class_="guide")
    if not named:
        return line
    anchor = "start" if share < 0.3 else "end" if share > 0.7 else "middle"
    said = f"chosen: {chosen.folded} folded" + (", refined" if chosen.refined else "")
    return joined((line, element("text", said, x=place, y=top - 5, text_anchor=anchor, class_="strong")))


def _bound(panel: Panel, quantity: Quantity) -> Markup:
    if quantity.bound is None:
        return Markup("")
    height = panel.y(quantity.bound)
    line = element("line", x1=0, x2="100%", y1=height, y2=height, class_="bound")
    below = quantity.allowed_above and panel.scale.share(quantity.bound) > 0.12
    name = element("text", quantity.bound_name, x=6, y=height, dy=16 if below else -6, class_="bound-name")
    return joined((line, name))


def _allowed(panel: Panel, quantity: Quantity) -> Markup:
    if quantity.bound is None or quantity.identity == "latency":
        return Markup("")
    edge, foot = float(panel.y(quantity.bound)), panel.top + panel.height
    top, bottom = (panel.top, edge) if quantity.allowed_above else (edge, foot)
    return element("rect", x=0, y=f"{top:.2f}", width="100%", height=f"{bottom - top:.2f}", class_="allowed")


def _legend(points: Sequence[FrontierPoint]) -> Markup:
    kinds = (
        ("one more adapter fitted", lambda point: not point.refined and point.action != "dropped"),
        ("one more adapter dropped", lambda point: not point.refined and point.action == "dropped"),
        ("trained again after the folding", lambda point: point.refined),
    )
    samples = [(said, next(filter(belongs, points), None)) for said, belongs in kinds]
    marks = [(said, _shape(point), _colour(point)) for said, point in samples if point is not None]
    if any(point.chosen for point in points):
        marks.append(("where the merged model stands", element("circle", r=5, class_="ring"), "s-exact"))
    entries = (element("li", mark_of(shape, kind), said) for said, shape, kind in marks)
    return element("ul", joined(entries), class_="legend")
