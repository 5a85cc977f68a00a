"""The report: JSON that anyone reads back, and the table on a console."""

import io
import json
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.console import Console
from torch import nn

from cadapt.merging import MergeReport, merge
from cadapt.report.merge import show_merge, summary_lines
from tests.merging.cases import linear, toy, trained


@pytest.fixture(scope="module")
def partial() -> MergeReport:
    """Of a model whose strided convs took their adapters up and whose depth-wise ones did not."""
    return merge(linear("layer-scaled"))[1]


def shown(report: MergeReport, width: int = 200) -> str:
    stream = io.StringIO()
    show_merge(report, Console(file=stream, width=width, color_system=None))
    return stream.getvalue()


def test_the_json_is_versioned_plain_and_whole(partial: MergeReport) -> None:
    report = partial
    record = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert record["schema"] == 1
    assert (record["merged"], record["total"]) == (report.merged, report.total) == (3, 12)
    assert record["end_to_end"]["images"] == 4
    assert record["verified"] is True
    assert len(record["sites"]) == 12
    assert {"site", "status", "reason", "error_fp64", "error_fp32", "relative_update", "effect"} <= set(
        record["sites"][0]
    )


def test_figures_that_are_no_numbers_are_null() -> None:
    _, report = merge(linear(toy(nn.Conv2d(8, 8, 3, padding=1))))
    row = replace(report.sites[0], error_fp64=float("inf"), effect=float("nan"))
    record = json.loads(json.dumps(replace(report, sites=(row,)).to_json(), allow_nan=False))
    assert record["sites"][0]["error_fp64"] is None
    assert record["sites"][0]["effect"] is None


def test_the_table_has_a_row_for_each_site_and_the_summary(partial: MergeReport) -> None:
    text = shown(partial)
    for row in partial.sites:
        assert row.site in text
    assert "24 groups" in text
    assert "3 of 12 adapters fold into the base exactly; 9 simplified" in text
    assert "timm checkpoint: no, 9 adapters" in text


def test_brackets_in_a_reason_are_text() -> None:
    _, report = merge(linear(toy(nn.Conv2d(8, 8, 3, padding=1))))
    row = replace(report.sites[0], status="refused", reason="shape [8, 3] [/red] is odd")
    assert "shape [8, 3] [/red] is odd" in shown(replace(report, sites=(row,)))


def test_nothing_inserted_shows_no_table() -> None:
    _, report = merge(trained("straight", "linear"))
    text = shown(report)
    assert "error fp64" not in text
    assert "only the head is the task's" in text
    assert "timm checkpoint" in text
    assert not any("adapters change" in line for line in summary_lines(report))


def test_the_values_need_no_torch() -> None:
    code = "import sys; import cadapt.report.merge; assert 'torch' not in sys.modules, 'torch came in'"
    subprocess.run([sys.executable, "-c", code], check=True)
