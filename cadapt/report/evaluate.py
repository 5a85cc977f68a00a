"""What ``cadapt eval`` shows: the figures, the weakest classes, the confusions, and classes missing on either side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cadapt.report.console import count, literal, new_table, percent, stderr_console

if TYPE_CHECKING:
    from cadapt.jobs import Evaluated

_SHOWN = 10
_LARGEST_MATRIX = 12


def show_evaluated(evaluated: Evaluated) -> None:
    """Show an evaluation."""
    result, console = evaluated.result, stderr_console()
    top5 = "" if result.top5 is None else f", top-5 {percent(result.top5)}"
    console.print(
        f"[bold]top-1 {percent(result.top1)}[/]{top5}, mean per class {percent(result.mean_per_class)}, "
        f"calibration error {percent(result.ece)}, loss {result.loss:.4f}"
    )
    console.print(f"{count(result.images)} pictures in {result.seconds:.1f} s ({result.images_per_second:.0f}/s)")
    _show_matching(evaluated)
    weakest = sorted((item for item in result.per_class if item.images), key=lambda item: item.recall or 0.0)
    if len(result.per_class) <= _LARGEST_MATRIX:
        _show_matrix(evaluated)
        return
    table = new_table("weakest classes", "pictures>", "right>")
    for item in weakest[:_SHOWN]:
        table.add_row(literal(item.name), count(item.images), percent(item.recall or 0.0, 1))
    console.print(table)
    _show_confusions(evaluated)


def _show_matching(evaluated: Evaluated) -> None:
    match, console = evaluated.match, stderr_console()
    if match.missing_in_data:
        console.print(f"no pictures of: {literal(_names(match.missing_in_data))}", style="yellow")
    if match.unknown_to_model:
        console.print(
            f"unknown to the model, {count(evaluated.dropped)} pictures left out: "
            f"{literal(_names(match.unknown_to_model))}",
            style="yellow",
        )


def _names(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _show_matrix(evaluated: Evaluated) -> None:
    names = [item.name for item in evaluated.result.per_class]
    table = new_table("true ╲ predicted", *(f"{literal(name)}>" for name in names), "right>")
    for name, row, item in zip(names, evaluated.result.confusion or (), evaluated.result.per_class, strict=True):
        share = "–" if item.recall is None else percent(item.recall, 1)
        table.add_row(literal(name), *(str(value) if value else "·" for value in row), share)
    stderr_console().print(table)


def _show_confusions(evaluated: Evaluated) -> None:
    names = [item.name for item in evaluated.result.per_class]
    pairs = [
        (value, names[true], names[predicted])
        for true, row in enumerate(evaluated.result.confusion or ())
        for predicted, value in enumerate(row)
        if value and true != predicted
    ]
    if not pairs:
        return
    table = new_table("most confused", "taken for", "pictures>")
    for value, true, predicted in sorted(pairs, reverse=True)[:_SHOWN]:
        table.add_row(literal(true), literal(predicted), count(value))
    stderr_console().print(table)
