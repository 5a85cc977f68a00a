"""What ``cadapt merge-report`` shows of several adapters: where they disagree, what their combinations are worth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cadapt.report.console import literal, new_table, number_of, percent

if TYPE_CHECKING:
    from rich.console import Console

    from cadapt.combining.report import CombineReport, PlaceConflict

_SHOWN = 12


def show_combination(report: CombineReport, console: Console) -> None:
    """Show a comparison: its places, its combinations where they were measured, and its summary lines.

    Args:
        report: what was found.
        console: where to; the commands pass the one on stderr.
    """
    if report.places:
        console.print(_places(report))
    if report.combinations:
        console.print(_combinations(report))
    for line in summary_lines(report):
        console.print(literal(line), highlight=False, soft_wrap=True)


def summary_lines(report: CombineReport) -> tuple[str, ...]:
    """Return the summary as plain lines."""
    hidden = len(report.places) - _SHOWN
    lines = [f"{number_of(hidden, 'place')} of less conflict not shown: --json has all"] if hidden > 0 else []
    for pair in report.overall:
        lines.append(
            f"{pair.first} and {pair.second}: cosine {number(pair.cosine)}, signs disagree at "
            f"{share(pair.sign_conflict)} of the larger entries, {share(pair.cancelled)} of the magnitude cancels, "
            f"norms 1 : {number(pair.norm_ratio)}"
        )
    if report.seeds_differ:
        seeds = ", ".join(f"{task.name} {task.seed}" for task in report.tasks)
        lines.append(f"adapters that do not fold began at different values (seeds: {seeds}): expect less of a mean")
    if report.head == "none":
        lines.append(f"no head for all classes: {report.head_reason}")
    else:
        classes = number_of(len(report.classes), "class", "classes")
        lines.append(f"combined head: {classes}, the adapters' own heads {report.head}")
    if len(report.combinations) > 1:
        lines.append(f"* chosen by {report.chosen_by}, on these pictures: judge {report.best} on others")
    return (*lines, report.verdict)


def _places(report: CombineReport) -> Any:
    title = literal(f"{' and '.join(task.name for task in report.tasks)} on {report.base}")
    table = new_table("place", "schemes", "cosine>", "signs disagree>", "cancels>", "norms>", title=title)
    worst = sorted(report.places, key=lambda place: place.cancelled or 0.0, reverse=True)[:_SHOWN]
    for place in (item for item in report.places if item in worst):
        table.add_row(
            literal(place.place),
            literal(schemes_of(place)),
            number(place.cosine),
            share(place.sign_conflict),
            share(place.cancelled),
            " : ".join(f"{value:.3g}" for value in place.norms),
        )
    return table


def _combinations(report: CombineReport) -> Any:
    names = [task.name for task in report.tasks]
    table = new_table(
        "top-1 of", *(f"{literal(name)}>" for name in names), *(f"{literal(name)}, all classes>" for name in names)
    )
    alone = [percent(task.top1 or 0.0, 1) for task in report.tasks]
    table.add_row("each by itself", *alone, *("" for _ in names))
    for item in report.combinations:
        mark = " *" if item.method == report.best and len(report.combinations) > 1 else ""
        known = [percent(value, 1) for value in item.known]
        table.add_row(f"{item.method}{mark}", *known, *(share(value) for value in item.open))
    return table


def schemes_of(place: PlaceConflict) -> str:
    """The schemes at a place, once where all files have the same; a dash for a file that changed nothing there."""
    names = [name or "–" for name in place.schemes]
    return names[0] if len(set(names)) == 1 else " / ".join(names)


def number(value: float | None) -> str:
    """A cosine or a ratio; a dash where there is none."""
    return "–" if value is None else f"{value:.2f}"


def share(value: float | None) -> str:
    """A share in percent; a dash where there is none."""
    return "–" if value is None else percent(value, 1)
