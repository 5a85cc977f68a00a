"""The golden table: which architectures belong, and what is found in each at its native size."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.zoo.check import SITE_KINDS
from tests.zoo.setting import SCHEMES

GOLDEN = Path(__file__).with_name("sites.csv")
COLUMNS = ("name", "family", "kind", "parameters_m", "input", *SITE_KINDS, *SCHEMES)
Row = dict[str, str]


def updating() -> bool:
    """Whether rows are to be rewritten, not compared."""
    return os.environ.get("CADAPT_UPDATE_GOLDEN") == "1"


def row_of(record: Mapping[str, Any]) -> Row:
    """The row of a sites record; counts are empty where the model could not be traced or a scheme refuses."""
    row = {key: str(record[key]) for key in COLUMNS[:5]}
    row |= {kind: str(record.get("sites", {}).get(kind, "")) for kind in SITE_KINDS}
    counts = record.get("schemes", {})
    return row | {scheme: str(counts[scheme]) if isinstance(counts.get(scheme), int) else "" for scheme in SCHEMES}


def read_golden() -> dict[str, Row]:
    """All rows by architecture; none where there is no table yet."""
    if not GOLDEN.exists():
        return {}
    with GOLDEN.open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def update_golden(rows: Iterable[Row]) -> None:
    """Put rows into the table, sorted by family and name."""
    table = read_golden() | {row["name"]: row for row in rows}
    write_rows(GOLDEN, COLUMNS, sorted(table.values(), key=lambda row: (row["family"], row["name"])))


def write_rows(path: Path, columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV in one go, so that a killed run leaves the old one or the new one."""
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def differences(record: Mapping[str, Any], golden: Row) -> list[str]:
    """How a sites record differs from its golden row."""
    row = row_of(record)
    return [f"{key} {row[key] or 'none'}, golden {golden[key] or 'none'}" for key in COLUMNS if row[key] != golden[key]]
