"""A merge on the terminal: legible at 80 columns, nothing empty, nothing obeyed."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from cadapt.merging.report import MergeReport
from cadapt.report.merge import show_merge, summary_lines
from cadapt.report.wide import Column, print_columns
from tests.report.merges import EVIL, exact_report, frontier, report


def shown(found: MergeReport, width: int) -> str:
    stream = io.StringIO()
    show_merge(found, Console(file=stream, width=width, color_system=None))
    return stream.getvalue()


def tables(text: str, *keys: str) -> list[str]:
    """The lines of the tables whose first column has one of these titles."""
    pieces = [piece.splitlines() for piece in text.split("\n\n")]
    found = [lines for lines in pieces if any(line.startswith(key) for line in lines[:2] for key in keys)]
    return [line for lines in found for line in lines]


@pytest.mark.parametrize("width", [80, 100, 160])
def test_no_table_is_wider_than_the_terminal_and_no_figure_is_broken(width: int) -> None:
    found = report(8)
    text = shown(found, width)
    sentences = ("fitted:", "kept:", "dropped:", "simplified:", "refused:")
    lines = [line for line in tables(text, "site", "folded") if not line.startswith(sentences)]
    assert len(lines) > 20
    assert max(cell_len(line) for line in lines) <= width
    for figure in ("7.8e-15", "−0.20", "1.15 k → 0", "903 k → 0", "97.08 %", "1.36×", "4.138 G"):
        assert figure in text, figure


def test_every_site_status_and_reason_is_there_at_80_columns() -> None:
    found = report(16)
    text = shown(found, 80)
    for row in found.sites:
        assert row.site in text
        assert row.status in text
        assert row.reason in text


def test_the_same_reason_is_told_once_with_the_number_of_sites() -> None:
    rows = tuple(replace(row, status="kept", reason="too dear", note="", hosts=()) for row in report(9).sites)
    text = shown(report(9, sites=rows), 80)
    assert text.count("too dear") == 1
    assert "kept: layer1.0.conv2, layer1.1.conv2, layer1.2.conv2 and 6 more: too dear" in text


def test_columns_without_figures_are_left_out() -> None:
    head = shown(exact_report(), 160).splitlines()[1]
    assert head.split() == [
        "site",
        "status",
        "error",
        "fp64",
        "error",
        "fp32",
        "‖Δ‖/‖h‖",
        "‖ΔW‖/‖W‖",
        "parameters",
        "MACs",
    ]
    assert "frontier" not in shown(exact_report(), 160)
    unlabelled = report(frontier=frontier(4, 2, labels=False, latency=False))
    found = [line.split() for line in shown(unlabelled, 160).splitlines() if line.startswith("folded")]
    assert found[0][:5] == ["folded", "last", "site", "how", "agree"] and "base" not in found[0]


def test_schemes_are_told_where_they_differ() -> None:
    assert " scheme " not in shown(report(), 160)
    rows = report().sites
    mixed = report(sites=(*rows[:-1], replace(rows[-1], scheme="lora")))
    assert " scheme " in shown(mixed, 160) and "lora" in shown(mixed, 160)


def test_the_chosen_point_is_marked_and_long_frontiers_are_thinned_out() -> None:
    text = shown(report(60), 160)
    points = tables(text, "folded")[1:]
    marked = [line for line in points if line.startswith("▶")]
    assert len(marked) == 1 and "chosen" in marked[0] and "refined" in marked[0]
    assert len(points) < 25
    assert "points between these left out" in text
    assert "left out" not in shown(report(8), 160).split("frontier")[1]


def test_the_summary_tells_all_that_was_measured() -> None:
    lines = summary_lines(report(8))
    assert "1 of 8 adapters fold into the base exactly, 3 fitted, 1 dropped; 1 simplified, 1 kept, 1 refused" in lines
    assert "adapter file 1.2 MB → 812.0 kB" in lines
    assert "tolerance top1=0.5%: met" in lines
    assert any("top-1 97.12 % → 96.82 % (−0.30 points), 98.1 % of predictions agree" in line for line in lines)
    assert any("merged 1.13× (1.11–1.16)" in line and "base 21.40 ms" in line for line in lines)
    missed = summary_lines(report(8, tolerance_met=False, verified=False))
    assert "tolerance top1=0.5%: NOT MET" in missed and missed[-1].startswith("NOT VERIFIED")


def test_top1_without_labels_is_no_figure() -> None:
    found = report()
    assert found.on_data is not None
    unlabelled = replace(found, on_data=replace(found.on_data, top1_before=float("nan"), top1_after=float("nan")))
    assert not any("top-1" in line for line in summary_lines(unlabelled))


@pytest.mark.parametrize("width", [80, 200])
def test_foreign_text_is_shown_and_not_obeyed(width: int) -> None:
    found = report(2, base=EVIL, scheme=EVIL, timm_reason=EVIL, summary=EVIL)
    rows = tuple(replace(row, site=EVIL, reason=EVIL, note=EVIL, hosts=(EVIL,)) for row in found.sites)
    points = tuple(replace(point, site=EVIL) for point in found.frontier)
    text = shown(replace(found, sites=rows, frontier=points), width)
    assert "\x1b" not in text and "\u202e" not in text
    assert r"\x1b[31m[red]\u202e" in text


def test_a_long_name_folds_and_leaves_room_for_figures() -> None:
    stream = io.StringIO()
    key = Column(title="site", cells=("a" * 90,))
    columns = [Column(title=f"figure{at}>", cells=("12345.6",)) for at in range(6)]
    assert not print_columns(
        key, columns, Console(file=stream, width=40), sentences=Column(title="x", cells=("y" * 50,))
    )
    lines = stream.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= 40
    assert stream.getvalue().count("12345.6") == 6
    assert stream.getvalue().count("a") >= 90
