"""What ``cadapt inspect GLOB`` shows: a row for each architecture, a column for each scheme, and what does not fit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from cadapt.report.console import literal, new_table, percent, stderr_console
from cadapt.report.schemes import shown_number

if TYPE_CHECKING:
    from rich.console import Console

    from cadapt.describe.listing import ArchitectureRow, Listing, SchemeRow

_Item = TypeVar("_Item")
# (heading, cells): a heading that ends in ">" is aligned to the right
_Column = tuple[str, list[str]]
_GAP = 1
_NONE = "–"


def show_listing(listing: Listing) -> None:
    """Show the table, in parts where the terminal is narrow, and under it what does not fit and what failed."""
    console = stderr_console()
    names: _Column = ("model", [literal(row.name) for row in listing.models])
    facts = [("parameters>", [_millions(row.parameters) for row in listing.models]),
             ("input", ["×".join(map(str, row.input_size or ())) or _NONE for row in listing.models]),
             *(_counts(listing, kind) for kind in ("block", "conv"))]  # fmt: skip
    schemes = [_scheme_column(listing, place) for place in range(len(listing.schemes))]
    for part in _parts(names, [*facts, *schemes], console.width):
        _print_table(console, part)
        console.print()
    console.print(f"under a scheme: its adapters{_tensors(listing)}, and what trains as a share of the backbone's "
                  "parameters, head left out", style="dim")  # fmt: skip
    for reason, misfits in _misfits(listing).items():
        console.print(f"does not fit: {literal(reason)}: {literal(misfits)}", soft_wrap=False)
    for reason, models in _grouped((row.error, row.name) for row in listing.models if row.error).items():
        console.print(f"could not be surveyed: {literal(reason)}: {literal(', '.join(models))}", style="yellow")
    console.print(_summary(listing))


def _tensors(listing: Listing) -> str:
    """What a number with a t means, where one is shown."""
    shown = any(scheme.tensors for row in listing.models for scheme in row.schemes)
    return " (t: tensors of the base that train or get a learned difference)" if shown else ""


def _summary(listing: Listing) -> str:
    total = len(listing.models)
    models = f"{total} model{'' if total == 1 else 's'}"
    return f"{models}, of which {listing.failed} could not be surveyed" if listing.failed else models


def _millions(value: int | None) -> str:
    return _NONE if value is None else f"{value / 1e6:.2f} M"


def _counts(listing: Listing, kind: str) -> _Column:
    return f"{kind}s>", [_NONE if row.error else str(row.site_counts.get(kind, 0)) for row in listing.models]


def _scheme_column(listing: Listing, place: int) -> _Column:
    found = [None if row.error else row.schemes[place] for row in listing.models]
    shares = [_share(item) for item in found]
    width = max(map(len, shares))
    cells = [
        _NONE
        if item is None or item.reason is not None
        else f"{shown_number(item.sites, item.tensors)} {share:>{width}}"
        for item, share in zip(found, shares, strict=True)
    ]
    return f"{listing.schemes[place]}>", cells


def _share(item: SchemeRow | None) -> str:
    return "" if item is None or item.reason is not None else percent(item.share)


def _parts(names: _Column, columns: Sequence[_Column], width: int) -> Iterator[list[_Column]]:
    """Break a table that is too wide for the terminal into several, each of which begins with the names."""
    part = [names]
    for column in columns:
        if len(part) > 1 and sum(_width(item) + _GAP for item in (*part, column)) > width:
            yield part
            part = [names]
        part.append(column)
    yield part


def _width(column: _Column) -> int:
    heading, cells = column
    return max(len(heading.removesuffix(">")), *map(len, cells))


def _print_table(console: Console, columns: Sequence[_Column]) -> None:
    table = new_table(*(heading for heading, _ in columns))
    for cells in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*cells)
    console.print(table)


def _misfits(listing: Listing) -> dict[str, str]:
    """For each reason why schemes do not fit, which do not, and the models."""
    found: dict[str, str] = {}
    for reason, named in _grouped(_reasons(listing.models)).items():
        models = dict.fromkeys(name for name, _ in named)
        everywhere = len(models) == len(listing.models) > 1
        schemes = ", ".join(dict.fromkeys(scheme for _, scheme in named))
        found[f"{schemes}: {reason}"] = "all of them" if everywhere else ", ".join(models)
    return found


def _reasons(models: Iterable[ArchitectureRow]) -> Iterator[tuple[str, tuple[str, str]]]:
    for row in models:
        for scheme in row.schemes:
            if scheme.reason is not None:
                # which site it was differs from model to model, and --json tells
                yield re.sub("^'[^']*': ", "", scheme.reason), (row.name, scheme.name)


def _grouped(pairs: Iterable[tuple[str | None, _Item]]) -> dict[str, list[_Item]]:
    groups: dict[str, list[_Item]] = {}
    for reason, item in pairs:
        groups.setdefault(reason or "", []).append(item)
    return groups
