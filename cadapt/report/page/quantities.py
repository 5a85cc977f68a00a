"""What the frontier's panels show: the figure that the tolerance is about first, then what a merge is made for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cadapt.report.page.scale import Scale, digits_of
from cadapt.tolerance import Tolerance, parse_tolerance

if TYPE_CHECKING:
    from cadapt.merging.report import FrontierPoint, MergeReport


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A figure of every point: how it is read and written, and the bound that it may not cross.

    ``limits`` is what no value can lie beyond. ``allowed_above`` says on which side of the bound it may lie.
    """

    identity: str
    title: str
    read: Callable[[FrontierPoint], float | None]
    written: Callable[[Scale], Callable[[float], str]]
    limits: tuple[float, float] = (0.0, math.inf)
    height: int = 100
    bound: float | None = None
    bound_name: str = ""
    allowed_above: bool = True

    def of(self, points: Sequence[FrontierPoint]) -> dict[FrontierPoint, float]:
        """Its values at the points where it is a finite number."""
        found = ((point, self.read(point)) for point in points)
        return {point: value for point, value in found if value is not None and math.isfinite(value)}


def quantities(report: MergeReport) -> list[Quantity]:
    """Top-1, or agreement where there are no labels, what the tolerance is about, MACs and latency, where measured."""
    tolerance = parse_tolerance(report.tolerance) if report.tolerance else None
    labelled = any(point.top1 is not None for point in report.frontier)
    wanted = {"top1" if labelled else "disagreement"} | ({tolerance.metric} if tolerance else set())
    judged = [quantity for quantity in _judged(report.frontier[0].images) if quantity.identity in wanted]
    found = [*(_bounded(quantity, tolerance, report.frontier) for quantity in judged), *_costs(report.frontier)]
    return [quantity for quantity in found if quantity.of(report.frontier)]


def _judged(images: int) -> tuple[Quantity, ...]:
    return (
        Quantity(
            identity="top1",
            title=f"Top-1 on {images:,} pictures",
            read=lambda point: point.top1,
            written=_percents,
            limits=(0, 1),
        ),
        Quantity(
            identity="disagreement",
            title=f"Predictions that stay the same, of {images:,}",
            read=lambda point: point.agreement,
            written=_percents,
            limits=(0, 1),
        ),
        Quantity(
            identity="logit",
            title="Largest difference of a logit",
            read=lambda point: point.max_logit_error,
            written=_numbers,
        ),
    )


def _bounded(quantity: Quantity, tolerance: Tolerance | None, points: Sequence[FrontierPoint]) -> Quantity:
    judged = replace(quantity, height=190)
    if tolerance is None or tolerance.metric != quantity.identity:
        return judged
    # the exact merges change nothing: before any adapter is fitted, top-1 is that of the unmerged model
    start = next((point.top1 for point in points if point.folded == 0 and not point.refined), None)
    top1 = None if start is None else start - tolerance.bound
    bound = {"top1": top1, "disagreement": 1 - tolerance.bound, "logit": tolerance.bound}[tolerance.metric]
    name = f"tolerance {tolerance}"
    return replace(judged, bound=bound, bound_name=name, allowed_above=tolerance.metric != "logit")


def _percents(scale: Scale) -> Callable[[float], str]:
    digits = digits_of(100 * scale.step)
    return lambda value: f"{100 * value:.{digits}f} %"


def _numbers(scale: Scale) -> Callable[[float], str]:
    digits = digits_of(scale.step)
    return lambda value: f"{value:.{digits}f}"


def _ratios(scale: Scale) -> Callable[[float], str]:
    digits = digits_of(scale.step)
    return lambda value: f"{value:.{digits}f}×"


def _costs(points: Sequence[FrontierPoint]) -> tuple[Quantity, ...]:
    prefix, unit = ("G", 1e9) if max(point.macs for point in points) >= 1e9 else ("M", 1e6)
    macs = Quantity(
        identity="macs",
        title=f"Multiply–accumulates of one image, in {prefix}",
        read=lambda point: point.macs / unit,
        written=_numbers,
    )
    latency = Quantity(
        identity="latency",
        title="Time in onnxruntime, over the base's",
        read=lambda point: point.latency,
        written=_ratios,
        bound=1.0,
        bound_name="base",
    )
    return macs, latency
