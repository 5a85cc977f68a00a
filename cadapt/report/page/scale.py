"""From figures to places: round numbers for an axis, and the share of its length at which a figure stands.

Places along a page are shares, written in percent, so that a plot is as wide as its reader's window while its letters
keep their size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_STEPS = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """An axis from ``low`` to ``high`` with its round numbers and the step between them."""

    low: float
    high: float
    ticks: tuple[float, ...]
    step: float

    def share(self, value: float) -> float:
        """Where a figure stands on the axis, from 0 to 1; what lies beyond stands at its end."""
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)


def scale_of(
    values: Iterable[float],
    *,
    most: int = 5,
    least_step: float = 0.0,
    floor: float = -math.inf,
    ceiling: float = math.inf,
) -> Scale:
    """Return an axis that holds all values.

    Args:
        values: at least one, all finite.
        most: how many steps it may have at the most.
        least_step: the smallest step that makes sense, 1 for things that are counted.
        floor: what no value can be below, such as 0 for a share.
        ceiling: what no value can be above.

    >>> scale_of([0.91, 0.98], ceiling=1).ticks
    (0.9, 0.92, 0.94, 0.96, 0.98)
    """
    found = list(values)
    low, high = min(found), max(found)
    if low == high:
        margin = max(abs(low) * 0.01, 1e-6, 2 * least_step)
        low, high = max(low - margin, floor), min(high + margin, ceiling)
    step = _step((high - low) / most, least_step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(step * at for at in range(first, last + 1) if floor - 1e-12 <= step * at <= ceiling + 1e-12)
    ticks = tuple(float(f"{tick:.12g}") for tick in ticks)
    return Scale(low=max(first * step, floor), high=min(last * step, ceiling), ticks=ticks, step=step)


def percent_of(share: float) -> str:
    """A share of the width as SVG writes it.

    >>> percent_of(1 / 3)
    '33.333%'
    """
    return f"{100 * share:.3f}%"


def digits_of(step: float) -> int:
    """How many decimals tell two neighbours apart that are a step from each other.

    >>> digits_of(0.25), digits_of(2), digits_of(0.1)
    (2, 0, 1)
    """
    return next((digits for digits in range(12) if math.isclose(round(step, digits), step, rel_tol=1e-6)), 12)


def _step(least: float, smallest: float) -> float:
    least = max(least, smallest)
    unit = 10.0 ** math.floor(math.log10(least))
    steps = (unit * factor for factor in _STEPS)
    return next(step for step in steps if step >= least * (1 - 1e-9) and (not smallest or step % smallest == 0))
