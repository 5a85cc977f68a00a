"""Bounds that the user sets on an evaluation: ``--fail-under top1=90%``.

They are read before anything is run, so that a slip of the pen costs no evaluation, and without torch. The commands
raise :class:`cadapt.errors.ThresholdMissedError` with the messages of :func:`check_thresholds`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cadapt.errors import UsageError, close_matches

Kind = Literal["at least", "at most"]

# every metric that can be bounded: more is better for "at least", less for "at most"
METRICS: Mapping[str, Kind] = {
    "top1": "at least",
    "top5": "at least",
    "mean_per_class": "at least",
    "images_per_second": "at least",
    "ece": "at most",
    "loss": "at most",
}
_SHARES = ("top1", "top5", "mean_per_class", "ece")


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """One bound: ``metric`` must be ``kind`` ("at least" or "at most") ``bound``; shares are between 0 and 1."""

    metric: str
    bound: float
    kind: Kind


def parse_thresholds(texts: Iterable[str]) -> tuple[Threshold, ...]:
    """Read bounds written as ``metric=number``, where a share may be written in percent.

    The bound is a lower one for accuracies and speed, an upper one for ``ece`` and ``loss``.

    Raises:
        UsageError: the metric is unknown, the value is no number, or a share lies outside 0 to 1.

    >>> [(item.metric, item.kind, item.bound) for item in parse_thresholds(["top1=90%", "ece=0.05"])]
    [('top1', 'at least', 0.9), ('ece', 'at most', 0.05)]
    """
    return tuple(_parse(text) for text in texts)


def check_thresholds(result: object, thresholds: Sequence[Threshold]) -> list[str]:
    """Return one line for each bound that is missed; an empty list means that all are met.

    A bound on what was not measured (``top5`` of five classes or fewer) is missed, and so is one on NaN.

    Args:
        result: an :class:`cadapt.evaluation.EvalResult`, or anything with the metrics as attributes.
        thresholds: the bounds.
    """
    messages = (_missed(getattr(result, item.metric), item) for item in thresholds)
    return [message for message in messages if message is not None]


def _parse(text: str) -> Threshold:
    name, equals, written = (part.strip() for part in text.partition("="))
    if not equals:
        raise UsageError(f"threshold '{text}' has no value, expected metric=number", hint="try top1=0.9 or ece=0.05")
    if name not in METRICS:
        raise UsageError(f"unknown metric '{name}' in threshold '{text}'", hint=close_matches(name, METRICS))
    percent = written.endswith("%")
    if percent and name not in _SHARES:
        raise UsageError(f"threshold '{text}' is in percent, but {name} is not a share", hint=f"try {name}=1.5")
    bound = _number(text, written.removesuffix("%"))
    bound = bound / 100 if percent else bound
    if name in _SHARES and bound > 1:
        hint = f"try {name}={written}%" if bound <= 100 and not percent else None
        raise UsageError(f"threshold '{text}' is above 1, and {name} is a share between 0 and 1", hint=hint)
    return Threshold(metric=name, bound=bound, kind=METRICS[name])


def _number(text: str, written: str) -> float:
    try:
        number = float(written)
    except ValueError as error:
        raise UsageError(f"threshold '{text}' is no number after '='", hint="try top1=0.9 or top1=90%") from error
    if not math.isfinite(number) or number < 0:
        raise UsageError(f"threshold '{text}' is {number}, expected a finite number from 0")
    return number


def _missed(value: float | None, threshold: Threshold) -> str | None:
    wanted = f"expected {threshold.kind} {threshold.bound:g}"
    if value is None:
        return f"{threshold.metric} was not measured, {wanted}"
    met = value >= threshold.bound if threshold.kind == "at least" else value <= threshold.bound
    return None if met else f"{threshold.metric} is {_shown(value, threshold.bound)}, {wanted}"


def _shown(value: float, bound: float) -> str:
    """Four digits, or as many as it takes to tell the value from a bound that it just misses."""
    rounded = f"{value:.4g}"
    return rounded if float(rounded) != bound else repr(value)
