"""What ``cadapt merge-report`` shows: a row per adapter, the frontier, then what the whole comes to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from cadapt.report import figures
from cadapt.report.console import literal, number_of
from cadapt.report.merge_lines import reason_lines, summary_lines
from cadapt.report.merge_rows import reason_of, size_of
from cadapt.report.wide import Column, print_columns

if TYPE_CHECKING:
    from rich.console import Console

    from cadapt.merging.report import FrontierPoint, MergeReport, SiteMerge

__all__ = ["show_merge", "summary_lines"]

Row = TypeVar("Row")

_COLOURS = {
    "exact": "green",
    "fitted": "green",
    "dropped": "green",
    "simplified": "cyan",
    "kept": "yellow",
    "refused": "red",
}
# a longer frontier is thinned out: its shape is what a terminal can show
_MOST_POINTS = 16


def show_merge(report: MergeReport, console: Console) -> None:
    """Show a merge: its table, where there are adapters, its frontier, where one was measured, and its summary lines.

    Args:
        report: what :func:`cadapt.merging.merge` found.
        console: where to; the commands pass the one on stderr.
    """
    if report.sites:
        _show_sites(report, console)
        console.print()
    if report.frontier:
        _show_frontier(report.frontier, console)
        console.print()
    for line in summary_lines(report):
        console.print(literal(line), highlight=False, soft_wrap=True)


def _show_sites(report: MergeReport, console: Console) -> None:
    rows = report.sites
    site, reasons = _column("site", rows, lambda row: row.site), _column("reason", rows, reason_of)
    title = literal(f"{report.base} with {report.scheme}")
    if not print_columns(site, _columns(rows), console, title=title, sentences=reasons):
        for line in reason_lines(rows):
            console.print(literal(line), highlight=False, soft_wrap=True)


def _columns(rows: Sequence[SiteMerge]) -> list[Column]:
    schemes = {row.scheme for row in rows}
    status = Column(title="status", cells=tuple(f"[{_COLOURS[row.status]}]{row.status}[/]" for row in rows))
    return [
        # one scheme for all is in the title
        *([_column("scheme", rows, lambda row: row.scheme)] if len(schemes) > 1 else []),
        status,
        _column("error fp64>", rows, lambda row: figures.scientific(row.error_fp64)),
        _column("error fp32>", rows, lambda row: figures.scientific(row.error_fp32)),
        _column("R²>", rows, lambda row: figures.fixed(row.r2)),
        _column("linear>", rows, lambda row: figures.share(row.linear_share, 0)),
        _column("‖Δ‖/‖h‖>", rows, lambda row: figures.plain(size_of(row))),
        _column("‖ΔW‖/‖W‖>", rows, lambda row: figures.plain(row.relative_update)),
        _column("parameters>", rows, lambda row: _both(row.parameters_before, row.parameters_after)),
        _column("MACs>", rows, lambda row: _both(row.macs_before, row.macs_after)),
    ]


def _both(before: int, after: int) -> str:
    return figures.rounded(before) if before == after else f"{figures.rounded(before)} → {figures.rounded(after)}"


def _show_frontier(points: Sequence[FrontierPoint], console: Console) -> None:
    shown = _thinned(points)
    left_out = len(points) - len(shown)
    title = f"frontier, on {number_of(points[0].images, 'picture')}"
    start = points[0].top1
    columns = [
        _column("last site", shown, lambda point: point.site),
        _column("how", shown, _how),
        _column("top-1>", shown, lambda point: figures.share(point.top1, 2)),
        _column("points>", shown, lambda point: figures.points(_lost(point, start), 2)),
        _column("agree>", shown, lambda point: figures.share(point.agreement, 2)),
        _column("max Δlogit>", shown, lambda point: figures.plain(point.max_logit_error)),
        _column("rms Δlogit>", shown, lambda point: figures.plain(point.logit_error)),
        _column("MACs>", shown, lambda point: figures.rounded(point.macs, 4)),
        _column("× base>", shown, lambda point: figures.ratio(point.latency)),
    ]
    print_columns(_column("folded", shown, _folded), columns, console, title=title)
    if left_out:
        console.print(f"{number_of(left_out, 'point')} between these left out", highlight=False)


def _folded(point: FrontierPoint) -> str:
    return f"{'▶' if point.chosen else ' '} {point.folded}"


def _how(point: FrontierPoint) -> str:
    words = (point.action, "refined" if point.refined else "", "chosen" if point.chosen else "")
    return ", ".join(word for word in words if word)


def _lost(point: FrontierPoint, start: float | None) -> float | None:
    return None if point.top1 is None or start is None else point.top1 - start


def _thinned(points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    every = -(-len(points) // _MOST_POINTS)
    last = len(points) - 1
    return [point for at, point in enumerate(points) if at % every == 0 or at == last or point.chosen or point.refined]


def _column(title: str, rows: Sequence[Row], cell: Callable[[Row], str]) -> Column:
    return Column(title=title, cells=tuple(literal(cell(row)) for row in rows))
