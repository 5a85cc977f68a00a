"""From the comparison's runs to its table: the learning rate chosen per scheme, means over seeds, CSV, JSON, Markdown.

A run's record is what ``scheme_runs.run_job`` returns. The learning rate is chosen by the validation split alone; the
test split's figures are read only of the runs that were chosen.
"""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One scheme on one backbone.

    ``status`` is ``done``, or ``unfit``, ``diverged`` or ``failed`` with a ``reason``, and figures that are None.
    ``top1`` is the mean over ``seeds`` runs, ``top1_std`` their sample deviation, None for a single run; shares lie
    between 0 and 1. ``parameters`` trains without the head, ``share`` is that over the backbone's own. ``adapters`` and
    ``base_tensors`` say what was inserted, and how many of the base's tensors train or take a learned difference;
    ``merged`` of ``mergeable_of`` of them fold into the base. ``seconds`` is one run's training.
    """

    backbone: str
    scheme: str
    status: str
    reason: str = ""
    lr: float | None = None
    seeds: int = 0
    adapters: int | None = None
    base_tensors: int | None = None
    parameters: int | None = None
    share: float | None = None
    top1: float | None = None
    top1_std: float | None = None
    merged: int | None = None
    mergeable_of: int | None = None
    seconds: float | None = None


def choose_lr(records: Iterable[Record], search_seed: int) -> float | None:
    """Return the learning rate of the run that did best on the validation split, or None where no run ended.

    Equal accuracies are told apart by the validation loss, and equal losses by the smaller rate. Only runs of
    ``search_seed`` count.
    """
    ended = [item for item in records if item["status"] == "done" and item["seed"] == search_seed]
    best = min(ended, key=lambda item: (-item["val_top1"], item["val_loss"], item["lr"]), default=None)
    return None if best is None else best["lr"]


def make_row(records: Sequence[Record], seeds: Sequence[int]) -> Row:
    """Sum up all runs of one scheme on one backbone; the first of ``seeds`` is the one that the rate was chosen by."""
    backbone, scheme = records[0]["backbone"], records[0]["scheme"]
    lr = choose_lr(records, seeds[0])
    chosen = [item for item in records if item["lr"] == lr and item["seed"] in seeds]
    broken = _worst([item for item in (chosen or records) if item["status"] != "done"])
    failed = _worst([item for item in records if item["status"] == "failed"])
    if failed or broken:
        worst = failed or broken
        assert worst is not None
        return Row(backbone=backbone, scheme=scheme, status=worst["status"], reason=worst["reason"], lr=lr)
    one, accuracies = chosen[0], [item["test_top1"] for item in chosen]
    merges: Record = next((item for item in records if "merged" in item), {})
    return Row(
        backbone=backbone,
        scheme=scheme,
        status="done",
        lr=lr,
        seeds=len(chosen),
        adapters=one["adapters"],
        base_tensors=one["base_tensors"],
        parameters=one["parameters"],
        share=one["parameters"] / one["base_parameters"],
        top1=statistics.fmean(accuracies),
        top1_std=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        merged=merges.get("merged"),
        mergeable_of=merges.get("mergeable_of"),
        seconds=round(statistics.fmean(item["train_seconds"] for item in chosen), 1),
    )


def _worst(records: Sequence[Record]) -> Record | None:
    order = ("unfit", "diverged", "failed")
    return max(records, key=lambda item: order.index(item["status"]), default=None)


def make_rows(records: Iterable[Record], seeds: Sequence[int]) -> list[Row]:
    """Sum up all runs: by backbone, then by trained parameters, the rows without figures last."""
    grouped: dict[tuple[str, str], list[Record]] = {}
    for item in records:
        grouped.setdefault((item["backbone"], item["scheme"]), []).append(item)
    backbones = list(dict.fromkeys(backbone for backbone, _ in grouped))
    rows = [make_row(items, seeds) for items in grouped.values()]
    return sorted(
        rows, key=lambda row: (backbones.index(row.backbone), row.parameters is None, row.parameters or 0, row.scheme)
    )


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write one line per row, the figures as they are; what there is none of stays empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[item.name for item in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def write_json(path: Path, rows: Sequence[Row], protocol: Mapping[str, Any]) -> None:
    """Write the rows with the protocol they were made under."""
    record = {"schema": 1, "protocol": dict(protocol), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def to_markdown(rows: Sequence[Row], titles: Mapping[str, str], notes: Sequence[str]) -> str:
    """Return a table for each backbone, then the notes; ``titles`` says how a backbone is called."""
    parts = []
    for backbone in dict.fromkeys(row.backbone for row in rows):
        own = [row for row in rows if row.backbone == backbone]
        parts.append(f"### {titles.get(backbone, backbone)} (`{backbone}`)\n")
        parts.append("| scheme | where | trained | % | lr | top-1 % | merges | s |")
        parts.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        parts += [_markdown_line(row) for row in own if row.status == "done"]
        parts.append("")
        parts += [f"- `{row.scheme}` {_VERDICTS[row.status]}: {row.reason}" for row in own if row.status != "done"]
        parts.append("")
    return "\n".join([*parts, *notes]).strip() + "\n"


_VERDICTS = {"unfit": "does not fit", "diverged": "diverged", "failed": "FAILED"}


def _markdown_line(row: Row) -> str:
    assert row.parameters is not None and row.share is not None and row.top1 is not None
    spread = "" if row.top1_std is None else f" ± {100 * row.top1_std:.1f}"
    merges = f"{row.merged}/{row.mergeable_of}" if row.mergeable_of else "—"
    cells = [
        f"`{row.scheme}`",
        _where(row),
        f"{row.parameters:,}",
        f"{100 * row.share:.2f}",
        f"{row.lr:g}",
        f"{100 * row.top1:.1f}{spread}",
        merges,
        f"{row.seconds:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _where(row: Row) -> str:
    counts = ((row.adapters, "site"), (row.base_tensors, "tensor"))
    return " + ".join(f"{count} {unit}{'s' * (count > 1)}" for count, unit in counts if count) or "—"
