"""The comparison as a picture: trained parameters on a log axis against accuracy, a panel for each backbone.

Names are set where nothing else is: around their point at growing distances until a free place is found, joined to it
by a thin line. Needs matplotlib (``pip install 'cadapt[plot]'``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox
from scheme_table import Row

PANEL_INCHES = (8.0, 6.5)
GAP_PIXELS = 2.0
"""Free space around each name."""

_MERGES, _STAYS = "#1f6f8b", "#c8553d"
# the date and random ids would make another file of the same table
_SVG_SETTINGS = {"svg.hashsalt": "cadapt", "svg.fonttype": "path"}


def draw(rows: Sequence[Row], titles: Mapping[str, str]) -> Figure:
    """Return the figure of all rows that have figures; a scheme that trains the head alone is a dashed line."""
    done = [row for row in rows if row.status == "done"]
    backbones = list(dict.fromkeys(row.backbone for row in done))
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * max(1, len(backbones)), height), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, max(1, len(backbones)), squeeze=False)[0]
    for axes, backbone in zip(panels, backbones, strict=False):
        own = [row for row in done if row.backbone == backbone]
        _draw_points(axes, own)
        axes.set_title(f"{titles.get(backbone, backbone)} ({backbone})")
    figure.legend(handles=_legend_lines(), loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    canvas.draw()  # settles the layout, so that pixels can be counted
    figure.set_layout_engine("none")
    for axes, backbone in zip(panels, backbones, strict=False):
        _name_points(axes, [row for row in done if row.backbone == backbone])
    return figure


def save(figure: Figure, stem: Path) -> tuple[Path, Path]:
    """Write ``stem.svg`` and ``stem.png``, the same bytes for the same figure, and return both paths."""
    svg, png = stem.with_suffix(".svg"), stem.with_suffix(".png")
    with matplotlib.rc_context(_SVG_SETTINGS):
        figure.savefig(svg, metadata={"Date": None})
    figure.savefig(png, dpi=150, metadata={"Software": None})
    return svg, png


def _draw_points(axes: Axes, rows: Sequence[Row]) -> None:
    for row in rows:
        assert row.top1 is not None
        top1, spread = 100 * row.top1, 100 * (row.top1_std or 0.0)
        if not row.parameters:
            axes.axhline(top1, color="0.45", linestyle="--", linewidth=1)
            axes.axhspan(top1 - spread, top1 + spread, color="0.5", alpha=0.12, linewidth=0)
            continue
        colour = _MERGES if row.mergeable_of and row.merged == row.mergeable_of else _STAYS
        axes.errorbar(row.parameters, top1, yerr=spread, fmt="o", color=colour, markersize=5, elinewidth=1, capsize=2.5)
    axes.set_xscale("log")
    axes.margins(x=0.15, y=0.12)
    axes.grid(which="major", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("trained parameters, without the head")
    axes.set_ylabel("top-1 on the test split, %, mean ± deviation over seeds")


def _legend_lines() -> list[Line2D]:
    return [
        Line2D([], [], marker="o", linestyle="", color=_MERGES, label="folds into the base"),
        Line2D([], [], marker="o", linestyle="", color=_STAYS, label="stays beside it, or is the base's own"),
        Line2D([], [], linestyle="--", color="0.45", label="trains the head alone"),
    ]


def _name_points(axes: Axes, rows: Sequence[Row]) -> None:
    """Write each scheme's name beside its point, from the best down."""
    renderer = axes.figure.canvas.get_renderer()  # type: ignore[attr-defined]
    inside = axes.get_window_extent(renderer)
    taken = [_point_box(axes, row) for row in rows if row.parameters]
    for row in rows:
        if not row.parameters:
            taken += [_name_line(axes, row), _line_box(axes, row, inside)]
    for row in sorted((row for row in rows if row.parameters), key=lambda item: -(item.top1 or 0.0)):
        taken.append(_name_point(axes, row, inside, taken))


def _name_point(axes: Axes, row: Row, inside: Bbox, taken: Sequence[Bbox]) -> Bbox:
    """Write one name at the nearest free place and return the pixels that it covers.

    Raises:
        RuntimeError: there is none.
    """
    assert row.parameters is not None and row.top1 is not None
    point = (row.parameters, 100 * row.top1)
    line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
    name = axes.annotate(
        row.scheme,
        point,
        xytext=(0, 0),
        textcoords="offset points",  # pixels would differ between the files
        fontsize=8,
        ha="center",
        va="center",
        arrowprops=line,
    )
    size = name_box(name)
    x, y = axes.transData.transform(point)
    for across, up in _offsets(size.width, size.height):
        box = Bbox.from_bounds(x + across - size.width / 2, y + up - size.height / 2, size.width, size.height)
        if _is_within(box, inside) and not any(box.padded(GAP_PIXELS).overlaps(other) for other in taken):
            points_per_pixel = 72 / axes.figure.dpi
            name.set_position((across * points_per_pixel, up * points_per_pixel))
            return box
    raise RuntimeError(f"no free place for the name {row.scheme} among {len(taken)} points and names")


def _name_line(axes: Axes, row: Row) -> Bbox:
    """Write the name of a scheme without parameters on its line and return the pixels that it covers."""
    assert row.top1 is not None
    place = axes.get_yaxis_transform()
    name = axes.annotate(row.scheme, (0.01, 100 * row.top1), xycoords=place, fontsize=8, color="0.35", va="bottom")
    return name_box(name)


def _line_box(axes: Axes, row: Row, inside: Bbox) -> Bbox:
    """The pixels that a scheme's line covers: no name is to be struck through."""
    assert row.top1 is not None
    _, y = axes.transData.transform((1.0, 100 * row.top1))
    return Bbox.from_extents(inside.x0, y - 1, inside.x1, y + 1)


def name_box(name: Annotation) -> Bbox:
    """Return the pixels that a name covers, its line left out."""
    renderer = name.get_figure(root=True).canvas.get_renderer()
    name.update_positions(renderer)
    return Text.get_window_extent(name, renderer)


def _offsets(width: float, height: float) -> Iterator[tuple[float, float]]:
    """Places around a point, in pixels, from near to far: beside it first, then in ever wider ellipses."""
    for ring in range(1, 60):
        reach = 6.0 * ring
        for turn in (0, 180, 30, 330, 150, 210, 60, 300, 120, 240, 90, 270):
            angle = math.radians(turn)
            yield (width / 2 + reach) * math.cos(angle), (height / 2 + reach) * math.sin(angle)


def _point_box(axes: Axes, row: Row) -> Bbox:
    """The pixels that a point and its error bar cover."""
    assert row.parameters is not None and row.top1 is not None
    spread = row.top1_std or 0.0
    low, high = (axes.transData.transform((row.parameters, 100 * (row.top1 + sign * spread))) for sign in (-1.0, 1.0))
    return Bbox.from_extents(low[0] - 4, low[1] - 4, high[0] + 4, high[1] + 4)


def _is_within(box: Bbox, frame: Bbox) -> bool:
    return bool(box.x0 >= frame.x0 and box.x1 <= frame.x1 and box.y0 >= frame.y0 and box.y1 <= frame.y1)
