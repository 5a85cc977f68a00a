"""The table that compares schemes on one base, within 100 columns: what each adds, what merges, what does not fit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cadapt.report.console import amount, count, literal, new_table, percent, stderr_console

if TYPE_CHECKING:
    from rich.table import Table

    from cadapt.describe.schemes import SchemeSummary

_WIDEST = 100
_CAPTION = (
    "head left out; t: tensors of the base that train or get a learned difference; activations: what training keeps "
    "for backward, {of}, in fp32, plainly and under the engine; merges: once trained it folds into the base's own "
    "tensors, or by its number why not"
)


def show_schemes(schemes: Sequence[SchemeSummary], activation_batch: int = 1) -> None:
    """Show the schemes that fit, those that train least first, then why adapters do not merge or schemes not fit.

    ``activation_batch`` is how many pictures their activations are of.
    """
    console = stderr_console()
    width = min(console.width, _WIDEST)
    fitting = sorted((scheme for scheme in schemes if scheme.reason is None), key=lambda scheme: scheme.parameters)
    marks = _number_reasons(fitting)
    if fitting:
        console.print(_table(fitting, marks), width=width)
        of = "a picture" if activation_batch == 1 else f"a batch of {activation_batch}"
        console.print(_CAPTION.format(of=of), style="dim", width=width)
    for mark, reason in _shown_reasons(fitting, marks).items():
        console.print(f"({mark}) {literal(reason)}", width=width)
    for reason, names in _group_misfits(schemes).items():
        console.print(f"does not fit: {literal(', '.join(names))}: {literal(reason)}", width=width)


def _table(schemes: Sequence[SchemeSummary], marks: dict[str, int]) -> Table:
    figures = ("adapters>", "trainable>", "%>", "MACs added>", "%>", "activations>", "engine>")
    table = new_table("scheme", *figures, "merges")
    # one line a scheme: a name that is cut is the lesser evil
    for column in table.columns:
        column.no_wrap = True
    for scheme in schemes:
        table.add_row(*_row(scheme, marks))
    return table


def _row(scheme: SchemeSummary, marks: dict[str, int]) -> tuple[Any, ...]:
    return (
        literal(scheme.name),
        shown_number(scheme.sites, scheme.tensors),
        count(scheme.parameters),
        percent(scheme.share).removesuffix(" %"),
        amount(scheme.macs_added, ""),
        percent(scheme.macs_share).removesuffix(" %"),
        amount(scheme.activation_bytes),
        amount(scheme.engine_activation_bytes),
        _merging(scheme, marks),
    )


def shown_number(adapters: int, tensors: int) -> str:
    """How many adapters and how many changed tensors: ``16``, ``53 t`` or both, ``16 + 53 t``.

    >>> shown_number(16, 0), shown_number(0, 53), shown_number(16, 53), shown_number(0, 0)
    ('16', '53 t', '16 + 53 t', '0')
    """
    parts = ([str(adapters)] if adapters or not tensors else []) + ([f"{tensors} t"] if tensors else [])
    return " + ".join(parts)


def _merging(scheme: SchemeSummary, marks: dict[str, int]) -> str:
    """Whether nothing is left of the adapters, with the numbers of the reasons against it."""
    if scheme.merged == scheme.sites:
        return "yes"
    numbers = ", ".join(str(mark) for mark in dict.fromkeys(marks[_gist(item.reason)] for item in scheme.merge_reasons))
    return f"{scheme.merged} of {scheme.sites} ({numbers})" if scheme.merged else f"no ({numbers})"


def _gist(reason: str) -> str:
    """A reason without its figures: what several sites have in common."""
    return re.sub(r"\d+", "#", reason)


def _number_reasons(schemes: Sequence[SchemeSummary]) -> dict[str, int]:
    gists = dict.fromkeys(_gist(item.reason) for scheme in schemes for item in scheme.merge_reasons)
    return {gist: place for place, gist in enumerate(gists, start=1)}


def _shown_reasons(schemes: Sequence[SchemeSummary], marks: dict[str, int]) -> dict[int, str]:
    """For each number its reason, the first as an example where they differ in figures."""
    found: dict[int, list[str]] = {}
    for reason in dict.fromkeys(item.reason for scheme in schemes for item in scheme.merge_reasons):
        found.setdefault(marks[_gist(reason)], []).append(reason)
    return {mark: f"{'' if len(reasons) == 1 else 'e.g. '}{reasons[0]}" for mark, reasons in found.items()}


def _group_misfits(schemes: Sequence[SchemeSummary]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for scheme in schemes:
        if scheme.reason is not None:
            groups.setdefault(scheme.reason, []).append(scheme.name)
    return groups
