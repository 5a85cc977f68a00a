"""What ``cadapt merge-report`` shows: a row per adapter, then what the whole comes to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cadapt.report.console import amount, count, literal, new_table, percent

if TYPE_CHECKING:
    from rich.console import Console

    from cadapt.merging.report import EndToEnd, MergeReport, SiteMerge

_COLOURS = {"exact": "green", "simplified": "cyan", "kept": "yellow", "refused": "red"}


def show_merge(report: MergeReport, console: Console) -> None:
    """Show a merge: its table, where there are adapters, and its summary lines.

    Args:
        report: what :func:`cadapt.merging.merge` found.
        console: where to; the commands pass the one on stderr.
    """
    if report.sites:
        console.print(_table(report))
    for line in summary_lines(report):
        console.print(literal(line), highlight=False, soft_wrap=True)


def summary_lines(report: MergeReport) -> tuple[str, ...]:
    """Return the summary as plain lines."""
    counts = [(status, report.count(status)) for status in ("simplified", "kept", "refused")]
    others = ", ".join(f"{count} {status}" for status, count in counts if count)
    lines = [report.summary + (f"; {others}" if others else "")]
    lines.append(
        f"parameters {count(report.parameters_before)} → {count(report.parameters_after)}, "
        f"MACs {amount(report.macs_before, '')} → {amount(report.macs_after, '')}"
    )
    source = "adapters" if report.sites else "differences" if report.differences else ""
    lines.append(_comparison(report.end_to_end, report.dtype, source))
    lines.append("timm checkpoint: yes" if report.timm_loadable else f"timm checkpoint: no, {report.timm_reason}")
    if not report.verified:
        lines.append("NOT VERIFIED: a check in fp64 failed")
    return tuple(lines)


def _comparison(found: EndToEnd, dtype: str, source: str) -> str:
    kind = "random images" if found.random_images else "images"
    effect = f", where the {source} change them by {found.logit_effect:.1e}" if source else ""
    return (
        f"end to end on {found.images} {kind}: logits differ by {found.max_abs_error_fp64:.1e} in float64 and "
        f"{found.max_abs_error:.1e} in {dtype}{effect}; "
        f"{percent(found.agreement, 1)} of predictions agree"
    )


def _table(report: MergeReport) -> Any:
    title = literal(f"{report.base} with {report.scheme}")
    table = new_table("site", "scheme", "status", "error fp64>", "error fp32>", "effect>", "reason", title=title)
    for row in report.sites:
        table.add_row(*_cells(row))
    return table


def _cells(row: SiteMerge) -> tuple[str, ...]:
    figures = (_figure(value) for value in (row.error_fp64, row.error_fp32, row.effect))
    status = f"[{_COLOURS[row.status]}]{row.status}[/]"
    return (literal(row.site), literal(row.scheme), status, *figures, literal(row.reason or row.note))


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"
