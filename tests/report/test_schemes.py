"""The table of schemes, without a model: its order, its footnotes, its width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from cadapt.describe.merges import MergeReason
from cadapt.describe.schemes import SchemeSummary
from cadapt.report.schemes import show_schemes

RELU = "its ReLU between the two convs is not linear"


def scheme(name: str, parameters: int = 0, sites: int = 0, reasons: Mapping[str, int] | None = None) -> SchemeSummary:
    kept = tuple(MergeReason(reason=reason, adapters=number) for reason, number in (reasons or {}).items())
    figures: dict[str, Any] = {"share": 0.0152, "macs_added": 63_800_000, "activation_bytes": 79_500_000}
    figures["engine_activation_bytes"] = 9_500_000
    merged = sites - sum(item.adapters for item in kept)
    return SchemeSummary(
        name=name, sites=sites, parameters=parameters, reason=None, merged=merged, merge_reasons=kept, **figures
    )


def misfit(name: str, reason: str) -> SchemeSummary:
    return SchemeSummary(name=name, sites=0, parameters=0, share=0.0, macs_added=0, activation_bytes=0, reason=reason)


def shown(capsys: pytest.CaptureFixture[str], *schemes: SchemeSummary) -> list[str]:
    show_schemes(schemes)
    out, err = capsys.readouterr()
    assert out == ""
    lines: list[str] = err.splitlines()
    assert max(map(len, lines), default=0) <= 100
    return lines


def test_those_that_train_least_come_first_and_reasons_are_numbered(capsys: pytest.CaptureFixture[str]) -> None:
    groups = {f"the conv has {number} groups": 1 for number in (32, 96)}
    lines = shown(
        capsys,
        scheme("res-par", 4_481_040, 16, {RELU: 16}),
        scheme("linear"),
        scheme("conv-par", 356_848, 16, {RELU: 16}),
        scheme("lora", 633_856, 52),
        scheme("residual-par", 1_000_000, 5, groups),
    )
    rows = [line.split() for line in lines[1:6]]
    assert [row[0] for row in rows] == ["linear", "conv-par", "lora", "residual-par", "res-par"]
    assert rows[1] == ["conv-par", "16", "356,848", "1.52", "63.8", "M", "0.00", "79.5", "MB", "9.5", "MB", "no", "(1)"]
    assert [row[11:] for row in rows] == [["yes"], ["no", "(1)"], ["yes"], ["3", "of", "5", "(2)"], ["no", "(1)"]]
    assert lines[-2:] == [f"(1) {RELU}", "(2) e.g. the conv has 32 groups"]


def test_misfits_are_told_once_for_all_schemes_of_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    reason = "it has no attention or MLP branches on a grid " + "as many other models have " * 4
    lines = shown(capsys, misfit("convpass", reason), misfit("convpass-attn", reason), misfit("vpt", "no [picture]"))
    text = " ".join(" ".join(lines).split())
    assert f"does not fit: convpass, convpass-attn: {reason.strip()}" in text
    assert lines[-1] == "does not fit: vpt: no [picture]"


def test_nothing_is_shown_of_no_schemes(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys) == []
