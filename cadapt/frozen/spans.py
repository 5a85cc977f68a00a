"""Which spans of a program to compute again: the cover of its cuts that keeps least under a limit on what is held."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# how much more than the least peak is put up with to keep less
_SLACK = 1.05
# how many times as many maps are worked with while a segment is computed again: the gradient that waits for it, too
_AGAIN = 5 / 4
_HALVINGS = 20


@dataclass(frozen=True, kw_only=True)
class Span:
    """Nodes behind ``start`` up to ``end``, by their places in the graph, and the bytes of either choice.

    ``is_whole``: nothing in between is read behind ``end``, nothing overwrites what is read from before, and something
    is kept.
    """

    first: int
    last: int
    input_bytes: int
    inner_bytes: int
    working_bytes: int
    macs: int
    is_whole: bool


Spans = Mapping[tuple[int, int], Span]
"""Spans by the numbers of the cuts that they run between."""


def least_peak(count: int, spans: Spans) -> list[Span]:
    """Choose what to compute again so that the most that is held at any time is least, and then what is kept."""
    low, high = 0.0, peak_of(count, spans)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if least_kept(count, spans, middle) is None else (low, middle)
    found = least_kept(count, spans, _SLACK * high)
    return [] if found is None else found[1]


def peak_of(count: int, spans: Spans) -> float:
    """The most that is held at a time where nothing is computed again."""
    before, peak = 0.0, 0.0
    for last in range(1, count):
        span = spans[last - 1, last]
        before += span.inner_bytes
        peak = max(peak, before + span.working_bytes)
    return peak


def least_kept(count: int, spans: Spans, limit: float) -> tuple[float, list[Span]] | None:
    """The cover of all cuts that keeps least and never holds more than a limit; None where no cover does.

    While a span is run, what the ones before it keep is held, and what it keeps itself and works with.
    """
    best: list[tuple[float, list[Span]] | None] = [(0.0, [])]
    for last in range(1, count):
        options: list[tuple[float, list[Span]]] = []
        for first in range(last):
            span, earlier = spans[first, last], best[first]
            if earlier is None:
                continue
            before, chosen = earlier
            if last == first + 1 and before + span.inner_bytes + span.working_bytes <= limit:
                options.append((before + span.inner_bytes, chosen))
            held = span.input_bytes + span.inner_bytes + span.working_bytes * _AGAIN
            if span.is_whole and before + held <= limit:
                options.append((before + span.input_bytes, [*chosen, span]))
        best.append(min(options, key=lambda option: option[0], default=None))
    return best[-1]
