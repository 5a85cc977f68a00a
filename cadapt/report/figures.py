"""Figures of reports as people read them: the same on the terminal and in pages, and a dash where there is none."""

from __future__ import annotations

import math
from collections.abc import Callable

from cadapt.report.console import amount

NONE = "–"


def share(value: float | None, digits: int = 1) -> str:
    """A share in percent.

    >>> share(0.9123), share(None)
    ('91.2 %', '–')
    """
    return _or_none(value, lambda found: f"{100 * found:.{digits}f} %")


def points(value: float | None, digits: int = 1) -> str:
    """A difference of two shares, in points, with its sign.

    >>> points(-0.0031), points(0.002), points(-0.0001)
    ('−0.3', '+0.2', '±0.0')
    """
    return _or_none(value, lambda found: signed(100 * found, digits))


def signed(value: float, digits: int) -> str:
    """A difference with its sign; what rounds to nothing has both."""
    size = f"{abs(value):.{digits}f}"
    sign = "±" if float(size) == 0 else "+" if value > 0 else "−"
    return sign + size


def ratio(value: float | None) -> str:
    """A time over another.

    >>> ratio(1.0149)
    '1.01×'
    """
    return _or_none(value, lambda found: f"{found:.2f}×")


def scientific(value: float | None) -> str:
    """An error, of which the order of magnitude matters.

    >>> scientific(3.14e-13), scientific(0.0)
    ('3.1e-13', '0')
    """
    return _or_none(value, lambda found: "0" if found == 0 else f"{found:.1e}")


def plain(value: float | None) -> str:
    """A size of two or three digits that need not be counted in zeros.

    >>> plain(0.083), plain(0.00021), plain(-1.5), plain(12.0)
    ('0.083', '2.1e-04', '−1.50', '12.0')
    """
    return _or_none(value, _plain)


def fixed(value: float | None, digits: int = 2) -> str:
    """A figure whose size is known, such as R², in so many decimals.

    >>> fixed(-0.0312), fixed(0.98)
    ('−0.03', '0.98')
    """
    return _or_none(value, lambda found: f"{found:.{digits}f}".replace("-", "−"))


def change(before: float, after: float) -> str:
    """How much less or more there is after than before, in percent.

    >>> change(4.0, 3.0), change(0, 3)
    ('−25.0 %', '–')
    """
    return NONE if before == 0 else f"{signed(100 * (after - before) / before, 1)} %"


def rounded(value: float, digits: int = 3) -> str:
    """An amount in so many digits, with a prefix where it is large.

    >>> rounded(12), rounded(1152), rounded(4_153_184_256, 4), rounded(999_999)
    ('12', '1.15 k', '4.153 G', '1.00 M')
    """
    found, prefix = float(f"{value:.{digits}g}"), ""
    for larger in ("k", "M", "G", "T"):
        if abs(found) < 1000:
            break
        found, prefix = found / 1000, f" {larger}"
    if not prefix:
        return f"{found:g}"
    return f"{found:.{digits - len(str(int(abs(found))))}f}{prefix}"


def number(value: float) -> str:
    """A number of things that may be large: all its digits to a million, then a prefix.

    >>> number(12544), number(23_508_032)
    ('12,544', '23.5 M')
    """
    return f"{int(value):,}" if abs(value) < 1e6 else amount(value, "").strip()


def _plain(found: float) -> str:
    sign, size = "−" if found < 0 else "", abs(found)
    if size == 0:
        return "0"
    if size < 0.001 or size >= 1e4:
        return f"{sign}{size:.1e}"
    digits = 3 if size < 0.1 else 2 if size < 10 else 1
    return f"{sign}{size:.{digits}f}"


def _or_none(value: float | None, shown: Callable[[float], str]) -> str:
    return NONE if value is None or not math.isfinite(value) else shown(value)
