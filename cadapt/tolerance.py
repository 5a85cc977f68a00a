"""What a merge may lose, as the user writes it: ``--tolerance top1=0.5%``.

Read before anything is run, and without torch; :mod:`cadapt.merging` folds under it, the commands exit by it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

from cadapt.errors import UsageError, close_matches

_LARGEST_PLAIN_SHARE = 0.1
Metric = Literal["top1", "disagreement", "logit"]


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """The most that a merged model may differ from the unmerged one.

    ``top1`` bounds how many points of top-1 it may lose, ``disagreement`` the share of predictions that may differ
    (both from 0 to 1), ``logit`` the largest absolute difference of a logit.
    """

    metric: Metric
    bound: float

    def __str__(self) -> str:
        """As it is written on the command line."""
        return f"{self.metric}={self.bound:g}" if self.metric == "logit" else f"{self.metric}={100 * self.bound:g}%"

    def allows(self, *, top1_lost: float | None, disagreement: float, max_logit_error: float) -> bool:
        """Whether figures of two models are within the tolerance; top-1 that was not measured is not."""
        found = {"top1": top1_lost, "disagreement": disagreement, "logit": max_logit_error}[self.metric]
        # counts of pictures, divided: 2 of 400 is not to fail 0.5 % by its last bit
        return found is not None and found <= self.bound + 1e-12


def parse_tolerance(text: str) -> Tolerance:
    """Read ``metric=number``, where a share may be written in percent.

    Raises:
        UsageError: the metric is unknown, the value is no number, or a share lies outside 0 to 1.

    >>> parse_tolerance("top1=0.5%").bound, str(parse_tolerance("logit=0.1"))
    (0.005, 'logit=0.1')
    """
    name, equals, written = (part.strip() for part in text.partition("="))
    if name not in get_args(Metric):
        raise UsageError(f"unknown tolerance '{text}'", hint=close_matches(name, get_args(Metric)))
    percent = written.endswith("%")
    number = written.removesuffix("%").strip()
    if not equals:
        raise UsageError(f"tolerance '{text}' has no value, expected metric=number", hint=f"try {name}=0.5%")
    if not re.fullmatch(r"[0-9.eE+-]+", number):
        raise UsageError(f"tolerance '{text}' is no number after '='", hint=f"try {name}=0.5")
    try:
        bound = float(number) / (100 if percent else 1)
    except ValueError as error:
        raise UsageError(f"tolerance '{text}' is no number after '='", hint=f"try {name}=0.5") from error
    if not math.isfinite(bound) or bound < 0:
        raise UsageError(f"tolerance '{text}' is no number from 0", hint="try top1=0.5% or logit=0.1")
    if name == "logit" and percent:
        raise UsageError(f"tolerance '{text}' is in percent, but a logit is no share", hint="try logit=0.1")
    if name != "logit" and bound > (1 if percent else _LARGEST_PLAIN_SHARE):
        # 0.5 is half, and who writes it most often means half a percent
        hint = f"write {name}={number}% for {number} percent" if not percent else f"try {name}=0.5%"
        raise UsageError(f"tolerance '{text}' allows {bound:.0%} to be lost", hint=hint)
    return Tolerance(metric=cast("Metric", name), bound=bound)
