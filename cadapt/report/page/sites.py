"""Every figure of every adapter, and of every point of the frontier, as tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cadapt.report import figures
from cadapt.report.merge_rows import reason_of, size_of
from cadapt.report.page.markup import Markup, element
from cadapt.report.page.statuses import status_cell
from cadapt.report.page.tables import Column, table

if TYPE_CHECKING:
    from cadapt.merging.report import FrontierPoint, MergeReport, SiteMerge

_MANY = 12
_Cell = Callable[["SiteMerge"], str]


def sites_table(report: MergeReport) -> Markup:
    """Return the table of all adapters; columns of figures that none of them has are left out."""
    shown = [(column, read) for column, read in _COLUMNS if _is_used(column, read, report.sites)]
    columns = (
        Column(title="site", figures=False, code=True),
        Column(title="status", figures=False),
        *(column for column, _ in shown),
        Column(title="reason", figures=False),
    )
    rows: list[tuple[str | Markup, ...]] = [
        (row.site, status_cell(row.status), *(read(row) for _, read in shown), _reason(row)) for row in report.sites
    ]
    return table(columns, rows, caption="All adapters, with every figure")


def frontier_table(points: Sequence[FrontierPoint]) -> Markup:
    """Return the table of the frontier, folded up where it is long; the chosen point stands out."""
    labelled = any(point.top1 is not None for point in points)
    timed = any(point.latency is not None for point in points)
    columns = [
        Column(title="folded"),
        Column(title="last site", figures=False, code=True),
        Column(title="how", figures=False),
        *([Column(title="top-1"), Column(title="points lost")] if labelled else []),
        Column(title="agreement"),
        Column(title="largest", group="difference of a logit"),
        Column(title="relative RMS", group="difference of a logit"),
        Column(title="parameters"),
        Column(title="MACs"),
        *([Column(title="× base")] if timed else []),
    ]
    start = points[0].top1
    rows = [_point(point, start, labelled, timed) for point in points]
    marked = frozenset(at for at, point in enumerate(points) if point.chosen)
    whole = table(columns, rows, caption="The frontier, point by point", marked=marked)
    return element("details", element("summary", f"All {len(points)} points"), whole, open=len(points) <= _MANY)


def _point(point: FrontierPoint, start: float | None, labelled: bool, timed: bool) -> tuple[str | Markup, ...]:
    how = ", ".join(filter(None, (point.action, "refined" if point.refined else "", "chosen" if point.chosen else "")))
    lost = None if point.top1 is None or start is None else point.top1 - start
    return (
        str(point.folded),
        point.site or "exact merges alone",
        how,
        *((figures.share(point.top1, 2), figures.points(lost, 2)) if labelled else ()),
        figures.share(point.agreement, 2),
        figures.plain(point.max_logit_error),
        figures.plain(point.logit_error),
        figures.number(point.parameters),
        figures.rounded(point.macs, 4),
        *((figures.ratio(point.latency),) if timed else ()),
    )


_COLUMNS: tuple[tuple[Column, _Cell], ...] = (
    (Column(title="scheme", figures=False), lambda row: row.scheme),
    (Column(title="R²"), lambda row: figures.fixed(row.r2)),
    (Column(title="linear"), lambda row: figures.share(row.linear_share, 0)),
    (Column(title="‖Δ‖/‖h‖"), lambda row: figures.plain(size_of(row))),
    (Column(title="‖ΔW‖/‖W‖"), lambda row: figures.plain(row.relative_update)),
    (Column(title="float64", group="error"), lambda row: figures.scientific(row.error_fp64)),
    (Column(title="float32", group="error"), lambda row: figures.scientific(row.error_fp32)),
    (Column(title="before", group="parameters"), lambda row: figures.number(row.parameters_before)),
    (Column(title="after", group="parameters"), lambda row: figures.number(row.parameters_after)),
    (Column(title="before", group="MACs"), lambda row: figures.rounded(row.macs_before)),
    (Column(title="after", group="MACs"), lambda row: figures.rounded(row.macs_after)),
)


def _is_used(column: Column, read: _Cell, rows: Sequence[SiteMerge]) -> bool:
    found = {read(row) for row in rows}
    # one scheme for all is in the title of the page
    return len(found) > 1 if column.title == "scheme" else found != {figures.NONE}


def _reason(row: SiteMerge) -> Markup:
    return element("span", reason_of(row) or figures.NONE, class_="wide")
