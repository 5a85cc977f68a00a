"""Every scheme on every family, in a folder where a killed run goes on: ``python -m tests.zoo.families --out DIR``.

Each cell is a task for the pool. What is written: ``cells.jsonl``, one line for each finished cell, ``cells.csv``, and
``cells.md``, the table. A cell is ok, refused with its reason, FAILED with what, or not run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tests.zoo.golden import write_rows
from tests.zoo.members import MEMBERS, may_refuse, scheme_names
from tests.zoo.pool import Record, run_pool
from tests.zoo.sweep import fingerprint

Cells = dict[str, Record]
COLUMNS = (
    *("family", "model", "side", "scheme", "status", "reason", "problems", "notes", "adapters", "deltas", "tuned"),
    *("trainable", "effect", "file_bytes", "merged", "simplified", "total", "worst_fp64", "end_to_end_fp64"),
    *("error_fp32", "timm_loadable", "kept_because", "onnx_worst", "onnx_opset", "seconds"),
)


def main(arguments: list[str] | None = None) -> int:
    """Try the cells asked for, write the reports, and return 1 if a cell failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.families", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the table's folder")
    parser.add_argument("--only-scheme", nargs="+", default=["*"], metavar="GLOB")
    parser.add_argument("--only-model", nargs="+", default=["*"], metavar="GLOB", help="of models' titles or families")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--no-onnx", action="store_true", help="leave the exports out")
    parser.add_argument("--memory", type=float, default=8.0, help="GB that one process may hold")
    parser.add_argument("--seconds", type=float, default=900.0, help="that one cell may take")
    given = parser.parse_args(arguments)
    # what another state of the code found says nothing of this one
    table = Table(folder=given.out / fingerprint(), jobs=given.jobs, limit_gb=given.memory, limit_seconds=given.seconds)
    table.go(chosen(given.only_scheme, given.only_model), onnx=not given.no_onnx)
    cells = table.cells()
    write_reports(table.folder, cells)
    words = [cell["status"] for cell in cells.values()]
    totals = ", ".join(f"{words.count(word)} {word}" for word in sorted(set(words)))
    print(f"{table.folder / 'cells.md'}: {totals}")
    return 1 if "FAILED" in words else 0


def chosen(schemes: Sequence[str], models: Sequence[str]) -> list[tuple[str, str]]:
    """Titles and schemes that match the globs; a model's cells follow one another."""
    return [
        (title, scheme)
        for title, member in MEMBERS.items()
        if any(fnmatchcase(title, glob) or fnmatchcase(member.family, glob) for glob in models)
        for scheme in scheme_names()
        if any(fnmatchcase(scheme, glob) for glob in schemes)
    ]


def prepare() -> None:
    """One thread, no warnings, and everything imported that the work needs."""
    import warnings

    import torch

    import tests.zoo.cells  # noqa: F401

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def cell_work(name: str, title: str, scheme: str, onnx: bool) -> Record:
    """One cell's record."""
    from tests.zoo.cells import check_cell

    return check_cell(name, title=title, scheme=scheme, onnx=onnx)


def settle(record: Record) -> Record:
    """A record as the table has it: one whose process died or whose check itself raised is a failure as well."""
    title, _, scheme = str(record["name"]).partition(" × ")
    record = {"title": title, "scheme": scheme, **record}
    if "error" in record:
        record |= {"status": "FAILED", "problems": [f"{record['error']} {record.get('at', '')}".strip()]}
    assert record["status"] in ("ok", "refused", "FAILED"), record
    if record["status"] == "refused" and not may_refuse(record["title"], record["scheme"]):
        problem = f"refused, and the family has what it takes: {record.get('reason')}"
        record |= {"status": "FAILED", "problems": [problem]}
    # no cell is refused or fails without a word
    if record["status"] != "ok" and not (record.get("reason") or record.get("problems")):
        record |= {"status": "FAILED", "problems": ["neither a reason nor a problem was given"]}
    return record


@dataclass(frozen=True, kw_only=True)
class Table:
    """A folder in which the table grows, and how its cells are tried."""

    folder: Path
    jobs: int = 2
    limit_gb: float = 8.0
    limit_seconds: float = 900.0
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)
    work: Callable[..., Record] = cell_work

    def cells(self) -> Cells:
        """The finished cells, the last word on each; a line that a kill cut off is taken for unfinished."""
        path, found = self.folder / "cells.jsonl", {}
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            found[record["name"]] = record
        return found

    def go(self, pairs: Iterable[tuple[str, str]], *, onnx: bool) -> None:
        """Try the cells that are not finished; one that was tried without an export is not, where one is asked for."""
        done = self.cells()
        tasks = []
        for title, scheme in pairs:
            name = f"{title} × {scheme}"
            cell = done.get(name)
            if cell is None or (onnx and cell["status"] == "ok" and "onnx" not in cell):
                tasks.append((name, {"title": title, "scheme": scheme, "onnx": onnx}))
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "cells.jsonl"
        cut = path.exists() and not path.read_text().endswith("\n")
        with path.open("a") as file:
            # a line that a kill cut off must not swallow the next
            file.write("\n" if cut else "")
            limits = {"limit_gb": self.limit_gb, "limit_seconds": self.limit_seconds}
            results = run_pool(self.work, tasks, jobs=self.jobs, prepare=prepare, **limits)
            for count, record in enumerate(map(settle, results), 1):
                file.write(json.dumps(record) + "\n")
                file.flush()
                self.say(f"{count}/{len(tasks)} {record['name']}: {in_short(record)}")


def in_short(cell: Record) -> str:
    """A cell in one line."""
    words = {"ok": "ok", "refused": f"refused: {cell.get('reason')}"}
    return words.get(cell["status"]) or "FAILED: " + "; ".join(cell["problems"])


def write_reports(folder: Path, cells: Cells) -> None:
    """Write ``cells.csv`` and ``cells.md`` of all members and schemes, cells that were not run included."""
    write_rows(folder / "cells.csv", COLUMNS, [_row(cell) for cell in _sorted(cells)])
    partial = folder / "cells.md.partial"
    partial.write_text(markdown(cells))
    partial.replace(folder / "cells.md")


def _sorted(cells: Cells) -> list[Record]:
    titles, schemes = list(MEMBERS), list(scheme_names())
    return sorted(cells.values(), key=lambda cell: (titles.index(cell["title"]), schemes.index(cell["scheme"])))


def _row(cell: Record) -> dict[str, Any]:
    member, merge, onnx = MEMBERS[cell["title"]], cell.get("merge", {}), cell.get("onnx", {})
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    row |= {"family": member.family, "model": member.title, "side": member.side}
    row |= {key: value for key, value in {**merge, **cell}.items() if key in row and value is not None}
    row |= {key: "; ".join(cell.get(key, ())) for key in ("problems", "notes")}
    row |= {"trainable": cell.get("training", {}).get("trainable", ""), "file_bytes": cell.get("file", {}).get("bytes")}
    row |= {"effect": cell.get("insertion", {}).get("effect"), "kept_because": "; ".join(merge.get("reasons", ()))}
    return row | {"onnx_worst": onnx.get("worst"), "onnx_opset": onnx.get("opset")}


def markdown(cells: Cells) -> str:
    """The tables: how each cell came out, what merges, how far ONNX is off, and every refusal, failure and note."""
    reasons: dict[str, int] = {}
    for cell in cells.values():
        if cell["status"] == "refused":
            reasons.setdefault(cell["reason"], len(reasons) + 1)
    lines = ["# Every scheme on every family", "", "ok, refused [why], FAILED, – not run.", ""]
    lines += _grid(cells, lambda cell: f"refused [{reasons[cell['reason']]}]" if "reason" in cell else cell["status"])
    lines += ["", "## Refused, because", ""]
    lines += [f"{number}. {reason}" for reason, number in reasons.items()] or ["nothing is"]
    lines += ["", "## FAILED", ""]
    failed = [cell for cell in _sorted(cells) if cell["status"] == "FAILED"]
    lines += [f"- {cell['name']}: {'; '.join(cell['problems'])}".replace("|", "/") for cell in failed] or ["none"]
    lines += ["", "## Merged adapters of all, and the worst error in fp64 of one", "", *_grid(cells, _merged)]
    lines += ["", "## The worst relative error in ONNX, at batches of 1, 2, 3 and 7", "", *_grid(cells, _exported)]
    lines += ["", "## Notes", ""]
    noted: dict[str, list[str]] = {}
    for cell in _sorted(cells):
        for note in cell.get("notes", ()):
            noted.setdefault(f"{cell['scheme']}: {note}", []).append(cell["title"])
    lines += [f"- {note} ({', '.join(titles)})" for note, titles in noted.items()] or ["none"]
    return "\n".join(lines) + "\n"


def _grid(cells: Cells, text: Callable[[Record], str]) -> list[str]:
    schemes = scheme_names()
    lines = [f"| family | model | {' | '.join(schemes)} |", f"|{' --- |' * (len(schemes) + 2)}"]
    for title, member in MEMBERS.items():
        found = [cells.get(f"{title} × {scheme}") for scheme in schemes]
        words = ["–" if cell is None else text(cell) for cell in found]
        lines.append(f"| {member.family} | {title} | {' | '.join(words)} |")
    return lines


def _merged(cell: Record) -> str:
    merge = cell.get("merge", {})
    if "total" not in merge:
        return ""
    if not merge["total"]:
        return "nothing to fold" if not cell["deltas"] else f"{cell['deltas']} differences"
    error = "" if merge["worst_fp64"] is None else f", {merge['worst_fp64']:.0e}"
    return f"{merge['merged']}/{merge['total']}{error}"


def _exported(cell: Record) -> str:
    worst = cell.get("onnx", {}).get("worst")
    return "" if worst is None else f"{worst:.0e}"


if __name__ == "__main__":
    sys.exit(main())
