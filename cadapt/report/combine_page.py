"""The page of several adapters: whether they can be combined, what each combination is worth, where they disagree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cadapt.report.combine import number, schemes_of, share
from cadapt.report.page import Column, Markup, Tile, definitions, document, header, section, table, tiles

if TYPE_CHECKING:
    from cadapt.combining.report import CombineReport

_MEANINGS = (
    (
        "cosine",
        "Of the angle between two task vectors, trained less initial values, times their weights: 1 is one direction, "
        "0 a right angle.",
    ),
    (
        "signs disagree",
        "Share of opposite signs among the entries that are of the larger ones in both vectors, as TIES counts; "
        "50 % where two vectors know nothing of each other.",
    ),
    (
        "cancels",
        "Share of the vectors' magnitude that their sum loses; 29 % for normal vectors independent of each other.",
    ),
    ("own classes", "Top-1 among the task's own classes, by its own head: the task is known."),
    ("all classes", "Top-1 among the classes of all tasks, by the combined file's head: the task is not known."),
)


def render(report: CombineReport) -> str:
    """Return the page: one file of HTML that loads nothing and runs no script."""
    title = " and ".join(task.name for task in report.tasks)
    top = header("Can they be combined?", f"{title} on {report.base}", _sentence(report.verdict), _tiles(report))
    return document(f"{title}: combination report", (top, *_sections(report)))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _tiles(report: CombineReport) -> Markup:
    found = [
        Tile(
            label=f"{pair.first} and {pair.second}",
            value=number(pair.cosine),
            detail=f"cosine; {share(pair.sign_conflict)} of signs disagree",
        )
        for pair in report.overall
    ]
    for item in report.combinations:
        if item.method == report.best:
            detail = f"{item.method}, all classes; own classes {share(item.worst_known)}"
            value = share(item.worst_known if item.worst_open is None else item.worst_open)
            if item.worst_open is None:
                detail = f"{item.method}, own classes; no head for all"
            found.append(Tile(label="top-1 of the worst task", value=value, detail=detail))
    return tiles(found)


def _sections(report: CombineReport) -> Iterator[Markup]:
    yield section("The adapters", _tasks(report))
    if report.combinations:
        yield section(
            "Combinations",
            _combinations(report),
            lead=_lead(report),
        )
    if report.places:
        yield section("Where they disagree", _places(report), lead="One line for each layer or adapter of the network.")
    yield section("How it was measured", definitions(_MEANINGS))


def _lead(report: CombineReport) -> str:
    if len(report.combinations) == 1:
        return "Top-1 on each task's pictures."
    return (
        f"Top-1 on each task's pictures. {report.best} is chosen on these pictures, by {report.chosen_by}: "
        "judge it on others."
    )


def _tasks(report: CombineReport) -> Markup:
    columns = (
        Column(title="name", figures=False),
        Column(title="scheme", figures=False),
        *(Column(title=name) for name in ("classes", "folded", "kept", "norm", "seed", "pictures", "top-1")),
    )
    rows = [
        (
            *(task.name, task.scheme, str(task.classes), str(task.folded), str(task.kept)),
            *(f"{task.norm:.3g}", str(task.seed), "–" if task.images is None else str(task.images), share(task.top1)),
        )
        for task in report.tasks
    ]
    return table(columns, rows, caption="The adapters that were compared")


def _combinations(report: CombineReport) -> Markup:
    names = [task.name for task in report.tasks]
    columns = (
        Column(title="method", figures=False),
        Column(title="settings", figures=False),
        *(Column(title=name, group="own classes") for name in names),
        *(Column(title=name, group="all classes") for name in names),
    )
    alone = ("each by itself", "", *(share(task.top1) for task in report.tasks), *("" for _ in names))
    rows = [alone]
    marked = set()
    for item in report.combinations:
        if item.method == report.best:
            marked.add(len(rows))
        rows.append((item.method, item.settings, *map(share, item.known), *map(share, item.open)))
    return table(columns, rows, caption="Top-1 of each method's combination", marked=frozenset(marked))


def _places(report: CombineReport) -> Markup:
    columns = (
        Column(title="place", figures=False, code=True),
        Column(title="schemes", figures=False),
        *(Column(title=name) for name in ("cosine", "signs disagree", "cancels", "norms")),
    )
    rows = [
        (
            *(place.place, schemes_of(place), number(place.cosine), share(place.sign_conflict)),
            *(share(place.cancelled), " : ".join(f"{value:.3g}" for value in place.norms)),
        )
        for place in report.places
    ]
    return table(columns, rows, caption="Conflicts at each place")
