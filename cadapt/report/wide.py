"""Tables that are wider than the terminal, broken by columns: each piece begins with what its rows are about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.text import Text

from cadapt.report.console import new_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_GAP = 2
_NONE = "–"
# fewer columns break sentences into shreds
_SENTENCE_WIDTH = 36


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column: its title, ending in ``>`` where it is aligned to the right, and its cells as console markup."""

    title: str
    cells: tuple[str, ...]

    @property
    def width(self) -> int:
        """The widest of title and cells, as a terminal counts."""
        return max(Text.from_markup(cell).cell_len for cell in (self.title.removesuffix(">"), *self.cells))

    @property
    def is_empty(self) -> bool:
        """Whether no row has anything here."""
        return set(self.cells) <= {"", _NONE}


def print_columns(
    key: Column,
    columns: Sequence[Column],
    console: Console,
    *,
    title: str | None = None,
    sentences: Column | None = None,
) -> bool:
    """Print a table, in as many pieces one below the other as the console's width asks for.

    Args:
        key: the first column of every piece; at most half of the width is its, and it folds where it is longer.
        columns: the others; those that are empty for all rows are left out.
        console: where to.
        title: over the first piece, as console markup.
        sentences: the last column, of long texts that wrap, where one piece leaves enough room for it.

    Returns:
        Whether the sentences were shown: no room is no place for them in any piece.
    """
    shown = [column for column in columns if not column.is_empty]
    key_width = min(key.width, console.width // 2)
    pieces = list(_pieces(shown, console.width - key_width))
    if sentences is not None and (sentences.is_empty or not _has_room(sentences, shown, console.width - key_width)):
        sentences = None
    for at, piece in enumerate(pieces):
        if at:
            console.print()
        console.print(_table(key, key_width, piece, title if at == 0 else None, sentences))
    return sentences is not None


def _has_room(sentences: Column, columns: Sequence[Column], width: int) -> bool:
    left = width - sum(column.width + _GAP for column in columns) - _GAP
    return left >= min(_SENTENCE_WIDTH, sentences.width)


def _pieces(columns: Sequence[Column], width: int) -> Iterator[list[Column]]:
    piece: list[Column] = []
    for column in columns:
        if piece and sum(each.width + _GAP for each in (*piece, column)) > width:
            yield piece
            piece = []
        piece.append(column)
    yield piece


def _table(
    key: Column, key_width: int, columns: Sequence[Column], title: str | None, sentences: Column | None
) -> Table:
    last = [] if sentences is None else [sentences]
    table = new_table(key.title, *(column.title for column in (*columns, *last)), title=title)
    table.columns[0].max_width = key_width
    for column in table.columns[1 : len(columns) + 1]:
        column.no_wrap = True
    for cells in zip(key.cells, *(column.cells for column in (*columns, *last)), strict=True):
        table.add_row(*cells)
    return table
