"""The page of a merge: the judgement and its figures, the frontier, the network layer by layer, and every detail.

What is shown is what the report holds; what was not measured is left out, never filled in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cadapt.report import figures
from cadapt.report.console import amount, number_of
from cadapt.report.page.document import definitions, document, header, section
from cadapt.report.page.frontier import frontier_plot
from cadapt.report.page.latency import latency_table
from cadapt.report.page.layers import layers_chart
from cadapt.report.page.markup import Markup
from cadapt.report.page.measured import how_measured
from cadapt.report.page.sites import frontier_table, sites_table
from cadapt.report.page.statuses import strip
from cadapt.report.page.tiles import Tile, Tone, badges, tiles

if TYPE_CHECKING:
    from cadapt.merging.report import MergeReport


def render(report: MergeReport) -> str:
    """Return the page of a merge: one file of HTML that loads nothing and runs no script.

    Args:
        report: what :func:`cadapt.merging.merge` found, and what was measured beside it.
    """
    title = f"{report.base} with {report.scheme}"
    return document(f"{title}: merge report", (_top(report, title), *_sections(report)))


def verdict(report: MergeReport) -> str:
    """What came of it, in a sentence or two.

    What was measured on real pictures is told before what was on random ones.
    """
    if not report.sites:
        return _sentence(report.summary)
    exact = f", {report.merged} of them exactly" if 0 < report.merged < report.gone else ""
    how = " by exact folding" if report.merged == report.gone > 0 else ""
    verb = "is" if report.total == 1 else "are"
    gone = f"{report.gone} of {number_of(report.total, 'adapter')} {verb} gone from the model{how}{exact}"
    found = report.on_data
    if found is None:
        error = report.end_to_end.max_abs_error
        return f"{gone}. The logits of the merged model differ by at most {error:.1e} in {report.dtype}."
    pictures = number_of(found.images, "picture")
    if not math.isfinite(found.top1_before):
        return f"{gone}. On {pictures}, {figures.share(found.agreement)} of the predictions stay the same."
    return (
        f"{gone}. On {pictures}, top-1 goes from {figures.share(found.top1_before, 2)} to "
        f"{figures.share(found.top1_after, 2)}, and {figures.share(found.agreement)} of the predictions stay the same."
    )


def _top(report: MergeReport, title: str) -> Markup:
    parts = [badges(_judgements(report)), tiles(overall(report))]
    return header("Merge report", title, verdict(report), *parts)


def _judgements(report: MergeReport) -> Iterator[tuple[str, Tone]]:
    if report.tolerance_met is not None:
        words = "within" if report.tolerance_met else "outside"
        yield f"{words} the tolerance {report.tolerance}", "good" if report.tolerance_met else "bad"
    if report.verified:
        yield "verified in float64", "good"
    else:
        yield "not verified: a check in float64 failed", "bad"
    yield "timm checkpoint" if report.timm_loadable else "no timm checkpoint", "plain"


def overall(report: MergeReport) -> Iterator[Tile]:
    """The figures that the page opens with, as far as they were measured."""
    counts = ((status, report.count(status)) for status in ("exact", "fitted", "dropped"))
    detail = ", ".join(f"{count} {status}" for status, count in counts if count)
    yield Tile(label="Adapters gone", value=f"{report.gone} of {report.total}", detail=detail or "none")
    yield from _quality(report)
    yield _amount_tile("Multiply–accumulates", report.macs_before, report.macs_after)
    yield _amount_tile("Parameters", report.parameters_before, report.parameters_after)
    if report.bytes_before is not None and report.bytes_after is not None:
        change = figures.change(report.bytes_before, report.bytes_after)
        detail = f"from {amount(report.bytes_before)}, {change}"
        yield Tile(label="Adapter file", value=amount(report.bytes_after), detail=detail)
    yield from _time(report)


def _amount_tile(label: str, before: int, after: int) -> Tile:
    detail = f"from {figures.rounded(before, 4)}, {figures.change(before, after)}"
    return Tile(label=label, value=figures.rounded(after, 4), detail=detail)


def _quality(report: MergeReport) -> Iterator[Tile]:
    missed = report.tolerance.partition("=")[0] if report.tolerance_met is False else ""
    found, checked = report.on_data, report.end_to_end
    if found is None:
        pictures = number_of(checked.images, "random image" if checked.random_images else "image")
        agreement, error = checked.agreement, checked.max_abs_error
        beside = f"adapters change them by {figures.plain(checked.logit_effect)}" if report.sites else ""
    else:
        pictures = number_of(found.images, "picture")
        agreement, error = found.agreement, found.max_logit_error
        beside = f"{figures.share(found.logit_error)} in relative RMS"
        if math.isfinite(found.top1_before):
            lost = figures.points(found.top1_after - found.top1_before, 2)
            detail = f"from {figures.share(found.top1_before, 2)}, {lost} points"
            yield Tile(
                label="Top-1", value=figures.share(found.top1_after, 2), detail=detail, tone=_tone("top1", missed)
            )
    tone = _tone("disagreement", missed)
    yield Tile(label="Predictions that agree", value=figures.share(agreement), detail=f"on {pictures}", tone=tone)
    tone = _tone("logit", missed)
    yield Tile(label="Largest logit difference", value=figures.plain(error), detail=beside, tone=tone)


def _tone(metric: str, missed: str) -> Tone:
    return "bad" if metric == missed else "plain"


def _time(report: MergeReport) -> Iterator[Tile]:
    models = {model.name: model for model in report.latency.models} if report.latency else {}
    if "merged" not in models:
        return
    merged, adapted = models["merged"], models.get("adapted")
    quartiles = f"quartiles {merged.ratio_low:.2f}–{merged.ratio_high:.2f}"
    before = f"from {figures.ratio(adapted.ratio)} with adapters, " if adapted else ""
    yield Tile(label="Time, over the base's", value=figures.ratio(merged.ratio), detail=before + quartiles)


def _sections(report: MergeReport) -> Iterator[Markup]:
    if report.frontier:
        lead = "One adapter goes after the other, the least harmful first; each point is a model that was measured."
        yield section("The frontier", frontier_plot(report), frontier_table(report.frontier), lead=lead)
    if report.sites:
        lead = "From the input to the output: high where the adapter is gone, low where it stays."
        yield section("Layer by layer", strip(report.sites), layers_chart(report.sites), lead=lead)
    if report.latency is not None:
        latency = report.latency
        lead = (
            f"{latency.runtime}, batches of {latency.batch_size}, {number_of(latency.threads, 'thread')}, "
            f"{number_of(latency.turns, 'turn')} in which every model ran once."
        )
        yield section("Latency", latency_table(latency), lead=lead)
    if report.sites:
        yield section("Every adapter", sites_table(report))
    yield section("How it was measured", definitions(how_measured(report)))


def _sentence(said: str) -> str:
    return said[:1].upper() + said[1:] + "."
