"""The time that each model takes, over the base's: the median and the middle half of the turns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cadapt.report import figures
from cadapt.report.console import amount
from cadapt.report.page.markup import Markup, element
from cadapt.report.page.scale import Scale, percent_of, scale_of
from cadapt.report.page.tables import Column, table

if TYPE_CHECKING:
    from cadapt.merging.report import Latency, ModelLatency

NAMES = {
    "base": "base, without adapters",
    "adapted": "with adapters",
    "simplified": "scales folded into adapters",
    "merged": "merged",
}
_COLUMNS = (
    Column(title="model", figures=False),
    Column(title="ms"),
    Column(title="× base"),
    Column(title="quartiles"),
    Column(title="", figures=False),
    Column(title="nodes"),
    Column(title="file"),
)
_HEIGHT, _MIDDLE = 14, 7


def latency_table(latency: Latency) -> Markup:
    """Return a row for each model, with its ratio drawn."""
    ends = [value for model in latency.models for value in (model.ratio_low, model.ratio_high, model.ratio)]
    scale = scale_of([1.0, *ends], floor=0)
    rows = [_row(model, scale) for model in latency.models]
    merged = frozenset(at for at, model in enumerate(latency.models) if model.name == "merged")
    return table(_COLUMNS, rows, caption="Latency of each model", marked=merged)


def _row(model: ModelLatency, scale: Scale) -> tuple[str | Markup, ...]:
    quartiles = figures.NONE if model.name == "base" else f"{model.ratio_low:.2f}–{model.ratio_high:.2f}"
    return (
        NAMES[model.name],
        f"{model.milliseconds:.2f}",
        figures.ratio(model.ratio),
        quartiles,
        _whisker(model, scale),
        figures.number(model.nodes),
        amount(model.bytes),
    )


def _whisker(model: ModelLatency, scale: Scale) -> Markup:
    low, median, high, one = (
        percent_of(scale.share(value)) for value in (model.ratio_low, model.ratio, model.ratio_high, 1.0)
    )
    return element(
        "svg",
        element("line", x1=0, x2="100%", y1=_MIDDLE, y2=_MIDDLE, class_="grid"),
        element("line", x1=one, x2=one, y1=0, y2=_HEIGHT, class_="axis"),
        element("line", x1=low, x2=high, y1=_MIDDLE, y2=_MIDDLE, class_="path"),
        element("circle", cx=median, cy=_MIDDLE, r=4, class_="solid"),
        width="100%",
        height=_HEIGHT,
        aria_hidden="true",
        class_=f"whisker {'s-exact' if model.name != 'base' else 's-base'}",
    )
