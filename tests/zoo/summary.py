"""What a sweep showed: a CSV by architecture, and a table by family with every exception named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.zoo.golden import COLUMNS, differences, read_golden, row_of, write_rows
from tests.zoo.setting import SCHEMES
from tests.zoo.stages import Records, Sweep

Verdict = tuple[str, str]
_TRACE_COLUMNS = ("traced", "head", "trace_seconds", "side", "numbers_seconds", "peak_gb", "golden", "notes")
REPORT_COLUMNS = (
    *COLUMNS[:-4],
    *(f"{scheme}{part}" for scheme in SCHEMES for part in ("", " adapters", " effect", " reason")),
    *_TRACE_COLUMNS,
)
_WORDS = ("passed", "on meta", "refused", "failed", "untraced", "not run")


def write_reports(sweep: Sweep) -> str:
    """Write ``report.csv`` and ``report.md`` and return the latter's last lines, the totals."""
    stages = {stage: sweep.records(stage) for stage in ("sites", "numbers", "rebuild")}
    names = [name for name, record in stages["sites"].items() if record.get("kind") is not None or "error" in record]
    verdicts = {name: {scheme: judge(name, scheme, stages) for scheme in SCHEMES} for name in sorted(names)}
    golden = read_golden()
    rows = [_csv_row(name, stages, verdicts[name], golden) for name in verdicts]
    write_rows(sweep.folder / "report.csv", REPORT_COLUMNS, rows)
    text = _markdown(stages["sites"], verdicts, rows)
    _write(sweep.folder / "report.md", text)
    return text.partition("\n## Exceptions")[0].rpartition("\n|")[2]


def judge(name: str, scheme: str, stages: Mapping[str, Records]) -> Verdict:
    """One of the words of the table, and why where it is not passed."""
    sites, numbers = stages["sites"][name], stages["numbers"].get(name)
    if "schemes" not in sites:
        return "untraced", str(sites.get("error", ""))
    refusal = sites["schemes"].get(scheme)
    if isinstance(refusal, str):
        return "refused", refusal.replace(f"{name} has", "it has").replace(f"{name}:", "").strip()
    if numbers is None:
        return "not run", ""
    if "error" in numbers:
        return "failed", f"{numbers['error']} {numbers.get('at', '')}".strip()
    problems = list(numbers.get("problems", []))
    if numbers.get("meta"):
        return ("failed", "; ".join(problems)) if problems else ("on meta", "too large to run")
    item = numbers["schemes"][scheme]
    problems += item.get("problems", [])
    if item["status"] == "refused":
        problems.append(f"refused at {numbers['side']} px: {item['reason']}")
    return _with_rebuild(name, scheme, stages["rebuild"].get(name), problems)


def _with_rebuild(name: str, scheme: str, rebuilt: Mapping[str, Any] | None, problems: list[str]) -> Verdict:
    if rebuilt is not None and "error" in rebuilt:
        problems.append(f"rebuild: {rebuilt['error']}")
    elif rebuilt is not None and rebuilt["differing"].get(scheme):
        problems.append(f"rebuilt in a new process, differs in {', '.join(rebuilt['differing'][scheme])}")
    if problems:
        return "failed", "; ".join(problems)
    return ("passed", "") if rebuilt is not None else ("not run", "not rebuilt yet")


def _csv_row(
    name: str, stages: Mapping[str, Records], verdicts: Mapping[str, Verdict], golden: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    sites, numbers = stages["sites"][name], stages["numbers"].get(name, {})
    row: dict[str, Any] = dict.fromkeys(REPORT_COLUMNS, "")
    if "kind" in sites:
        row |= {key: value for key, value in row_of(sites).items() if key not in SCHEMES}
        known = golden.get(name)
        row["golden"] = "; ".join(differences(sites, dict(known))) if known else "not in it"
    row["name"] = name
    for scheme, (word, reason) in verdicts.items():
        item = numbers.get("schemes", {}).get(scheme, {})
        count = sites.get("schemes", {}).get(scheme)
        row |= {scheme: word, f"{scheme} reason": reason, f"{scheme} effect": _rounded(item.get("effect"))}
        row[f"{scheme} adapters"] = count if isinstance(count, int) else ""
    notes = [] if numbers.get("drops", True) else ["nothing is dropped in train mode"]
    row |= {"traced": "yes" if "sites" in sites else "no", "trace_seconds": sites.get("seconds", "")}
    row["head"] = sites.get("head") or ""
    row |= {"side": numbers.get("side", ""), "numbers_seconds": numbers.get("seconds", "")}
    return row | {"peak_gb": numbers.get("peak_gb", ""), "notes": "; ".join(notes)}


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _markdown(sites: Records, verdicts: Mapping[str, Mapping[str, Verdict]], rows: Sequence[Mapping[str, Any]]) -> str:
    families: dict[str, list[str]] = {}
    for name in verdicts:
        families.setdefault(str(sites[name].get("family", "?")), []).append(name)
    head = ["family", "architectures", "traced", *SCHEMES]
    lines = ["# The zoo, by family", "", _line(head), _line(["---"] * len(head))]
    lines += [_line(_cells(family, families[family], sites, verdicts)) for family in sorted(families)]
    for kind in ("convnet", "hybrid"):
        lines.append(
            _line(_cells(f"all {kind}s", [n for n in verdicts if sites[n].get("kind") == kind], sites, verdicts))
        )
    lines.append(_line(_cells("**all**", list(verdicts), sites, verdicts)))
    lines += ["", "## Exceptions", "", *_exceptions(verdicts)]
    lines += ["", "## Where no task's head fits", ""]
    lines += [f"- {row['name']}: {row['head']}" for row in rows if row["head"]] or ["none"]
    lines += ["", "## Unlike the golden table", ""]
    lines += [f"- {row['name']}: {row['golden']}" for row in rows if row["golden"]] or ["none"]
    slow = sorted(sites.values(), key=lambda item: -float(item.get("seconds", 0)))[:10]
    lines += ["", "## Slowest to trace and search", ""]
    lines += [f"- {item['name']}: {float(item.get('seconds', 0)):.1f} s" for item in slow]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _cells(
    title: str, names: Sequence[str], sites: Records, verdicts: Mapping[str, Mapping[str, Verdict]]
) -> list[object]:
    cells: list[object] = [title, len(names), sum("sites" in sites[name] for name in names)]
    for scheme in SCHEMES:
        words = [verdicts[name][scheme][0] for name in names]
        cells.append(", ".join(f"{words.count(word)} {word}" for word in _WORDS if word in words))
    return cells


def _exceptions(verdicts: Mapping[str, Mapping[str, Verdict]]) -> list[str]:
    """Each reason once, with the scheme and all names it holds for."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for name, by_scheme in verdicts.items():
        for scheme, (word, reason) in by_scheme.items():
            if word not in ("passed", "not run"):
                grouped.setdefault((word, reason, name if word == "failed" else ""), []).append(f"{name} {scheme}")
    lines = []
    for (word, reason, _), items in sorted(grouped.items()):
        by_name: dict[str, list[str]] = {}
        for item in items:
            name, _, scheme = item.partition(" ")
            by_name.setdefault(name, []).append(scheme)
        named = ", ".join(f"{name} ({', '.join(schemes)})" for name, schemes in by_name.items())
        lines.append(f"- {word}: {reason.replace('|', '/')}: {named}")
    return lines or ["none"]


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)
