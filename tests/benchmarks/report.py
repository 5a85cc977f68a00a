"""The benchmark's rows as a Markdown table: for each case, every contender beside its competitors' best form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tests.benchmarks.timing import ratio

Row = Mapping[str, Any]
MEBIBYTE = 2**20
# what a contender is compared with: of each pair the one that was faster in this case
_RIVALS = {
    "full": ("full", "full-cl"),
    "paper": ("paper", "paper-cl"),
    "LoRA": ("lora", "lora-cl"),
    "plain": ("plain",),
}
_CASE_KEYS = ("model", "batch", "size", "precision", "device")


def case_of(row: Row) -> tuple[Any, ...]:
    """Return what rows of one case share."""
    return tuple(row[key] for key in _CASE_KEYS)


def group_by_case(rows: Iterable[Row], key: str = "contender") -> dict[tuple[Any, ...], dict[str, Row]]:
    """Return the rows by case, then by what ``key`` holds."""
    grouped: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        grouped.setdefault(case_of(row), {})[row[key]] = row
    return grouped


def render(rows: Sequence[Row], machine: Mapping[str, Any]) -> str:
    """Return the whole report."""
    parts = [_head(machine)]
    for case, by_name in group_by_case(rows).items():
        model, batch, size, precision, device = case
        parts.append(f"## {model}, batch {batch}, {size} px, {precision}, {device}\n\n{_table(by_name)}")
    return "\n\n".join(parts) + "\n"


def _head(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number)
    where = machine["accelerator"] or f"{machine['processor']}, {machine['threads']} thread(s)"
    return (
        f"# Training steps\n\n{where}; {versions}.\n\n"
        "Steps are interleaved in one process. “× full” and the like say how many times as fast as that competitor's "
        "faster memory format: medians of the ratios within a round. “saved” is what lives from forward to backward "
        "besides parameters and buffers, “of full” its share of full fine-tuning's; “peak” is a process's growth over "
        "model and data, gradients and optimizer state included."
    )


def _table(by_name: Mapping[str, Row]) -> str:
    rivals = {title: best for title, names in _RIVALS.items() if (best := _fastest(by_name, names)) is not None}
    titles = ["contender", "ms", "images/s", *(f"× {title}" for title in rivals), "saved MiB", "of full", "peak MiB"]
    lines = [_line(titles), _line(["---", *["---:"] * (len(titles) - 1)])]
    full = by_name.get("full", {}).get("saved")
    reasons = []
    for row in by_name.values():
        if row["status"] != "ok":
            lines.append(_line([row["what"], row["status"], *[""] * (len(titles) - 2)]))
            reasons.append(f"- {row['what']}: {row['status']}: {row['reason']}.")
            continue
        if row["note"]:
            reasons.append(f"- {row['what']}: {row['note']}.")
        speeds = [f"{ratio(by_name[rival]['step_seconds'], row['step_seconds']):.2f}" for rival in rivals.values()]
        share = f"1/{full['bytes'] / row['saved']['bytes']:.1f}" if full and row["saved"]["bytes"] else "–"
        milliseconds = 1000 * row["median_step_seconds"]
        lines.append(
            _line(
                [
                    row["what"],
                    f"{milliseconds:.1f}",
                    f"{row['images_per_second']:.1f}",
                    *speeds,
                    f"{row['saved']['bytes'] / MEBIBYTE:.1f}",
                    share,
                    _peak(row),
                ]
            )
        )
    return "\n".join([*lines, *(["", *reasons] if reasons else [])])


def _fastest(by_name: Mapping[str, Row], names: Sequence[str]) -> str | None:
    ran = [name for name in names if name in by_name and by_name[name]["status"] == "ok"]
    # by pairs, as all else is compared
    return min(
        ran, key=lambda name: ratio(by_name[name]["step_seconds"], by_name[ran[0]]["step_seconds"]), default=None
    )


def _peak(row: Row) -> str:
    peak = row.get("peak", {}).get("peak_bytes")
    return "–" if peak is None else f"{peak / MEBIBYTE:.0f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
