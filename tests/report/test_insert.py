"""The table of a plan: a row each where adapters are few, a row for equal ones where they are many."""

from __future__ import annotations

import pytest

from cadapt.report.insert import show_plan
from tests.contract.cases import adapt


def shown(capsys: pytest.CaptureFixture[str], trait: str, scheme: str) -> list[str]:
    show_plan(adapt(trait, scheme)[2])
    lines: list[str] = capsys.readouterr().err.splitlines()
    return lines


def test_few_adapters_have_a_row_each(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "plain", "conv-par")
    assert lines[1].split() == ["site", "kind", "form", "in", "out", "K", "stride", "σ", "parameters"]
    assert [line.split()[0] for line in lines[2:9]][:2] == ["layer1.0.conv1", "layer1.0.conv2"]
    assert lines[9].startswith("settings: down=channel, ")
    assert lines[10].startswith("7 adapters, ")


def test_many_adapters_share_rows_that_count_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, model = adapt("tokens", "ssf")
    lines = shown(capsys, "tokens", "ssf")
    rows = [line.split() for line in lines[2:] if "×" in line.split()[1]]
    assert "blocks.*.attn.qkv" in [row[0] for row in rows]
    assert sum(int(row[1].removeprefix("×")) for row in rows) == len(model.plan.insertions)
    # what no adapter has is no column
    assert "K" not in lines[1].split()
    assert lines[-1].startswith(f"{len(model.plan.insertions)} adapters, ")


def test_more_kinds_than_a_screen_holds_are_cut_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, model = adapt("plain", "ssf")
    lines = shown(capsys, "plain", "ssf")
    rows = [line.split() for line in lines[2:26]]
    rest = len(model.plan.insertions) - sum(int(row[1].removeprefix("×")) for row in rows)
    assert rest > 0
    assert lines[26].startswith(f"… and {rest} adapters more, of ")
    assert lines[26].endswith("--json lists all")


def test_differences_are_told_by_kind_of_tensor(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "plain", "norm")
    assert lines[1].split() == ["tensor", "number", "parameters", "names"]
    total = sum(int(line.split()[1].removeprefix("×")) for line in lines[2:-1])
    assert lines[-1].startswith(f"differences to {total} tensors of the base, ")
