"""The console that tables and notes go to: stderr, so that stdout stays data."""

from __future__ import annotations

import re

from rich.console import Console
from rich.markup import escape
from rich.table import Table

# what a terminal obeys in place of showing it: control characters, among them the escape that begins a command; line
# breaks, which would forge a line of ours; marks that turn the direction of writing; halves of surrogate pairs
_OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Untrusted text in one line that no terminal obeys: its control characters are shown as escapes.

    >>> print(printable("cat\x1b]0;title\x07"))
    cat\x1b]0;title\x07
    """
    return _OBEYED.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def literal(text: str) -> str:
    """Untrusted text for a console with markup: :func:`printable`, and its square brackets mean nothing."""
    return escape(printable(text))


def stderr_console() -> Console:
    """A console on the stderr of this moment; as wide as a table needs where stderr is no terminal."""
    console = Console(stderr=True, highlight=False)
    return console if console.is_terminal else Console(stderr=True, highlight=False, width=160)


def new_table(*columns: str, title: str | None = None) -> Table:
    """A plain table; a column whose name ends in ``>`` is aligned to the right."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.removesuffix(">"), justify="right" if column.endswith(">") else "left", overflow="fold")
    return table


def count(value: float) -> str:
    """A count as people write it: ``4,481,040``, and ``1.23 G`` from a billion on.

    >>> count(356848)
    '356,848'
    """
    if value >= 1e9:
        return f"{value / 1e9:.2f} G"
    return f"{int(value):,}"


def amount(value: float, unit: str = "B") -> str:
    """An amount with a decimal prefix: ``1.4 MB``.

    >>> amount(1_427_392)
    '1.4 MB'
    """
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 1000 or prefix == "T":
            digits = 0 if prefix == "" else 1
            return f"{value:.{digits}f} {prefix}{unit}"
        value /= 1000
    raise AssertionError


def number_of(value: int, one: str, many: str | None = None) -> str:
    """A number of things.

    >>> number_of(1, "epoch"), number_of(20, "epoch"), number_of(2, "class", "classes")
    ('1 epoch', '20 epochs', '2 classes')
    """
    return f"{count(value)} {one if value == 1 else many or f'{one}s'}"


def percent(value: float, digits: int = 2) -> str:
    """A share as a percentage: ``1.40 %``."""
    return f"{100 * value:.{digits}f} %"
