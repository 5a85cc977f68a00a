"""What a merge comes to, as plain lines: counts, costs, both models compared, latency, tolerance, reasons."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cadapt.report import figures
from cadapt.report.console import amount, count, number_of, percent
from cadapt.report.merge_rows import reason_of

if TYPE_CHECKING:
    from cadapt.merging.report import EndToEnd, Latency, MergeReport, OnData, SiteMerge, Status

# the summary names those that are gone
_OTHERS: tuple[Status, ...] = ("simplified", "kept", "refused")
_MOST_NAMES = 3


def summary_lines(report: MergeReport) -> tuple[str, ...]:
    """Return the summary as plain lines."""
    return tuple(_summary(report))


def reason_lines(rows: Sequence[SiteMerge]) -> Iterator[str]:
    """Each reason once, with its status and the first of the sites that it holds for."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if reason := reason_of(row):
            found.setdefault((row.status, reason), []).append(row.site)
    for (status, reason), sites in found.items():
        more = f" and {len(sites) - _MOST_NAMES} more" if len(sites) > _MOST_NAMES else ""
        yield f"{status}: {', '.join(sites[:_MOST_NAMES])}{more}: {reason}"


def _summary(report: MergeReport) -> Iterator[str]:
    counts = [(status, report.count(status)) for status in _OTHERS]
    others = ", ".join(f"{found} {status}" for status, found in counts if found)
    yield report.summary + (f"; {others}" if others else "")
    yield (
        f"parameters {count(report.parameters_before)} → {count(report.parameters_after)}, "
        f"MACs {figures.rounded(report.macs_before, 4)} → {figures.rounded(report.macs_after, 4)}"
    )
    if report.bytes_before is not None and report.bytes_after is not None:
        yield f"adapter file {amount(report.bytes_before)} → {amount(report.bytes_after)}"
    source = "adapters" if report.sites else "differences" if report.differences else ""
    yield _comparison(report.end_to_end, report.dtype, source)
    if report.on_data is not None:
        yield _on_data(report.on_data, report.dtype)
    if report.latency is not None:
        yield _latency(report.latency)
    if report.tolerance_met is not None:
        yield f"tolerance {report.tolerance}: {'met' if report.tolerance_met else 'NOT MET'}"
    yield "timm checkpoint: yes" if report.timm_loadable else f"timm checkpoint: no, {report.timm_reason}"
    if not report.verified:
        yield "NOT VERIFIED: a check in fp64 failed"


def _comparison(found: EndToEnd, dtype: str, source: str) -> str:
    kind = "random images" if found.random_images else "images"
    effect = f", where the {source} change them by {found.logit_effect:.1e}" if source else ""
    return (
        f"end to end on {found.images} {kind}: logits differ by {found.max_abs_error_fp64:.1e} in float64 and "
        f"{found.max_abs_error:.1e} in {dtype}{effect}; "
        f"{percent(found.agreement, 1)} of predictions agree"
    )


def _on_data(found: OnData, dtype: str) -> str:
    top1 = ""
    if math.isfinite(found.top1_before) and math.isfinite(found.top1_after):
        lost = figures.points(found.top1_after - found.top1_before, 2)
        top1 = f"top-1 {percent(found.top1_before)} → {percent(found.top1_after)} ({lost} points), "
    pictures = number_of(found.images, "picture")
    return (
        f"on {pictures} in {dtype}: {top1}{percent(found.agreement, 1)} of predictions agree, "
        f"logits differ by at most {figures.plain(found.max_logit_error)}"
    )


def _latency(latency: Latency) -> str:
    others = [
        f"{model.name} {figures.ratio(model.ratio)} ({model.ratio_low:.2f}–{model.ratio_high:.2f})"
        for model in latency.models
        if model.name != "base"
    ]
    base = [f"base {model.milliseconds:.2f} ms" for model in latency.models if model.name == "base"]
    where = f"{latency.runtime}, batch {latency.batch_size}, {number_of(latency.threads, 'thread')}"
    turns = number_of(latency.turns, "turn")
    return f"latency over the base's: {', '.join(others + base)}; {where}, median and quartiles of {turns}"
