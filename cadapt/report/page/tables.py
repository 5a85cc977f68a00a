"""Tables of pages: figures stand right, in figures of one width, and wide tables scroll in a frame of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from cadapt.report.page.markup import Markup, element, joined


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column: its title, whether it holds figures or names, and the title that it shares with its neighbours."""

    title: str
    figures: bool = True
    code: bool = False
    group: str = ""


def table(
    columns: Sequence[Column],
    rows: Iterable[Sequence[str | Markup]],
    *,
    caption: str,
    marked: frozenset[int] = frozenset(),
) -> Markup:
    """Return a table; the first cell of a row is its heading.

    Args:
        columns: from the left.
        rows: as many cells as there are columns; strings are text.
        caption: what the table shows, also the name of its frame for those who hear the page.
        marked: the rows, from 0, that stand out.
    """
    body = (
        element("tr", *map(_cell, columns, row, [True] + [False] * len(row)), class_="marked" if at in marked else None)
        for at, row in enumerate(rows)
    )
    whole = element("table", element("caption", caption), _head(columns), element("tbody", joined(body)))
    # a frame that scrolls is reached by the keyboard, too
    return element("div", whole, class_="frame", tabindex=0, role="region", aria_label=caption)


def _head(columns: Sequence[Column]) -> Markup:
    grouped = any(column.group for column in columns)
    first, second = [], []
    for group, found in groupby(columns, key=lambda column: column.group):
        members = list(found)
        lower = [element("th", column.title, scope="col", class_=_side(column)) for column in members]
        if group:
            first.append(element("th", group, scope="colgroup", colspan=len(members), class_="group"))
            second.extend(lower)
            continue
        first.extend(
            element("th", column.title, scope="col", class_=_side(column), rowspan=2 if grouped else None)
            for column in members
        )
    rows = [element("tr", *first), *([element("tr", *second)] if second else [])]
    return element("thead", *rows)


def _cell(column: Column, content: str | Markup, heading: bool) -> Markup:
    if heading:
        return element("th", content, scope="row", class_=_class(column))
    return element("td", content, class_=_class(column))


def _side(column: Column) -> str | None:
    return "figure" if column.figures else None


def _class(column: Column) -> str | None:
    return "code" if column.code else _side(column)
