"""How each figure of a merge was measured, in a line each, and only for the figures that are there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cadapt.report.console import number_of

if TYPE_CHECKING:
    from cadapt.merging.report import MergeReport


def how_measured(report: MergeReport) -> Iterator[tuple[str, str]]:
    """Figures and how they came about."""
    if report.sites:
        yield from _by_site(report)
    yield from _end_to_end(report)
    if report.frontier:
        yield (
            "frontier",
            "Adapters are folded or dropped greedily; after each, the statistics of those behind it are taken anew. "
            f"Every point is measured on the same {number_of(report.frontier[0].images, 'picture')}, against the "
            "unmerged model's predictions and logits. The point is chosen on them: a figure to publish needs others.",
        )
    if report.latency is not None:
        yield (
            "latency",
            "The models were exported to ONNX and run in turns, so that what slows the machine slows all of them. The "
            "ratio is the median over the turns of a model's time to the base's in the same turn.",
        )
    yield "parameters and MACs", "Counted in the whole model, before and after; multiply–accumulates are of one image."
    if not report.timm_loadable and report.timm_reason:
        yield "timm checkpoint", f"None can be written: {report.timm_reason}."


def _by_site(report: MergeReport) -> Iterator[tuple[str, str]]:
    rows = report.sites
    if any(row.error_fp64 is not None for row in rows):
        yield (
            "error",
            "The largest difference over the largest value, on random input, between the layer with its adapter and "
            "the merged layer, computed in float64 and in float32. An exact merge must stay within 1e-12 in float64.",
        )
    if any(row.relative_size is not None for row in rows):
        yield "‖Δ‖/‖h‖", "What the adapter adds, over what it is added to, on real pictures; on random input elsewhere."
    elif any(row.effect is not None for row in rows):
        yield "‖Δ‖/‖h‖", "What the adapter adds, over what it is added to, on random input."
    if any(row.relative_update is not None for row in rows):
        yield "‖ΔW‖/‖W‖", "The change of the base's weights that took the adapter up, over the weights."
    if any(row.r2 is not None for row in rows):
        yield (
            "R²",
            "The share of what the adapter does (about its mean, where a bias can give that) that the best kernel in "
            "the base's layers stands in for: ridge least squares in float64, judged on pictures it was not fitted to. "
            "Below 0 it is worse than nothing.",
        )
    if any(row.linear_share is not None for row in rows):
        yield "linear", "The share of the adapter's activations that work in their linear range."


def _end_to_end(report: MergeReport) -> Iterator[tuple[str, str]]:
    found = report.end_to_end
    pictures = number_of(found.images, "random image" if found.random_images else "image")
    yield (
        "end to end",
        f"Adapted and merged model on {pictures}: logits differ by {found.max_abs_error_fp64:.1e} in float64 and by "
        f"{found.max_abs_error:.1e} in {report.dtype} from the adapted model's, on a scale of {found.logit_scale:.1f}.",
    )
    if report.on_data is not None:
        yield (
            "top-1 and agreement",
            f"Adapted and merged model on {number_of(report.on_data.images, 'picture')}, both in {report.dtype}.",
        )
