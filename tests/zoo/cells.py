"""One scheme on one model, all the way: identity, one step of training, the adapter file, the merge, ONNX.

Each part is tried even where another failed, and whatever is raised becomes a problem of the record with the line it
came from: a cell is ok, refused with a reason, or failed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path

import cadapt
from cadapt.errors import CadaptError
from cadapt.plan import Plan
from cadapt.planning import plan_insertions
from tests.zoo.cell_checks import (
    Bench,
    Record,
    bench,
    check_file,
    check_insertion,
    check_merge,
    check_onnx,
    check_training,
)
from tests.zoo.check import checksum, in_words

_PACKAGE = Path(cadapt.__file__).parent


def check_cell(name: str, *, title: str, scheme: str, onnx: bool) -> Record:
    """Everything the table says of one cell.

    Args:
        name: the record's.
        title: a member of the table.
        scheme: a scheme's name, or several joined by ``+``.
        onnx: export and compare as well.
    """
    start = time.process_time()
    record: Record = {"name": name, "title": title, "scheme": scheme, "problems": [], "notes": []}
    table = bench(title)
    try:
        plan = plan_insertions(table.backbone, scheme, seed=3, surveyed=table.surveyed)
    except CadaptError as refusal:
        return record | _refused(refusal, scheme, table)
    if table.reasons.get(scheme) is not None:
        record["problems"].append(f"planned, where fitting_schemes says: {table.reasons[scheme]}")
    record |= {"adapters": len(plan.insertions), "deltas": len(plan.deltas), "tuned": len(plan.trainable)}
    for part, check in _parts(table, plan, scheme, onnx).items():
        found = _tried(part, check)
        record["problems"] += [f"{part}: {problem}" for problem in found.pop("problems", ())]
        record["notes"] += [f"{part}: {note}" for note in found.pop("notes", ())]
        record[part] = found
        if part == "training" and "tensors" not in found:
            break  # there is no trained model to go on with
    if checksum(table.backbone.model) != table.state:
        bench.cache_clear()
        record["problems"].append("the base was changed")
    status = "FAILED" if record["problems"] else "ok"
    return record | {"status": status, "seconds": round(time.process_time() - start, 2)}


def _parts(table: Bench, plan: Plan, scheme: str, onnx: bool) -> dict[str, Callable[[], Record]]:
    trained = functools.cache(lambda: check_training(table, plan))
    parts: dict[str, Callable[[], Record]] = {
        "insertion": lambda: check_insertion(table, plan, scheme),
        "training": lambda: trained()[1],
        "file": lambda: check_file(table, trained()[0]),
        "merge": lambda: check_merge(table, trained()[0]),
    }
    return parts | ({"onnx": lambda: check_onnx(trained()[0])} if onnx else {})


def _tried(part: str, check: Callable[[], Record]) -> Record:
    try:
        return check()
    except Exception as error:  # whatever is raised is a finding about this cell
        return {"problems": [f"{in_words(error)} at {_place(error)}"]}


def _place(error: BaseException) -> str:
    """The innermost line of cadapt's own, else of anybody's."""
    trace, places = error.__traceback__, []
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        places.append((file.parent, f"{file.parent.name}/{file.name}:{trace.tb_lineno}"))
        trace = trace.tb_next
    own = [place for folder, place in places if folder.is_relative_to(_PACKAGE)]
    return (own or [place for _, place in places])[-1]


def _refused(refusal: CadaptError, scheme: str, table: Bench) -> Record:
    reason = refusal.message.replace(table.backbone.base.name, "it")
    problems = [] if refusal.hint else ["a refusal without a hint"]
    if "+" not in scheme and table.reasons[scheme] is None:
        problems.append(f"refused, where fitting_schemes says it fits: {reason}")
    return {"status": "FAILED" if problems else "refused", "reason": reason, "problems": problems}
