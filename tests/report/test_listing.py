"""The table of a listing, without a model: what does not fit and what failed are told once, and nothing is too wide."""

from __future__ import annotations

import pytest

from cadapt.describe.listing import ArchitectureRow, Listing, SchemeRow
from cadapt.report.listing import show_listing

SCHEMES = ("conv-par", "conv-seq", "res-par")


def fitting(name: str, share: float = 0.0125) -> SchemeRow:
    return SchemeRow(name=name, sites=16, parameters=1000, share=share, reason=None)


def misfit(name: str, reason: str) -> SchemeRow:
    return SchemeRow(name=name, sites=0, parameters=0, share=0.0, reason=reason)


def row(name: str, *schemes: SchemeRow, error: str | None = None) -> ArchitectureRow:
    counts = {} if error else {"block": 4, "conv": 7}
    return ArchitectureRow(
        name=name,
        input_size=(3, 224, 224),
        parameters=None if error else 5_290_000,
        site_counts=counts,
        schemes=schemes,
        error=error,
    )


LISTING = Listing(
    glob="net*",
    schemes=SCHEMES,
    models=(
        row("net1", *map(fitting, SCHEMES)),
        row("net2", fitting("conv-par", 0.5), misfit("conv-seq", "'a.b': K=1 is even"), misfit("res-par", "no blocks")),
        row("net3", fitting("conv-par"), misfit("conv-seq", "'c.d': K=1 is even"), misfit("res-par", "no blocks")),
        row("net10", error="cannot trace [Net]: it branches"),
    ),
)


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    show_listing(LISTING)
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_a_row_for_each_model_and_a_column_for_each_scheme(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.split() for line in shown(capsys).splitlines()]
    assert lines[0] == ["model", "parameters", "input", "blocks", "convs", *SCHEMES]
    assert lines[1] == ["net1", "5.29", "M", "3×224×224", "4", "7", *["16", "1.25", "%"] * 3]
    assert lines[2] == ["net2", "5.29", "M", "3×224×224", "4", "7", "16", "50.00", "%", "–", "–"]
    assert lines[4] == ["net10", "–", "3×224×224", "–", "–", "–", "–", "–"]


def test_reasons_are_told_once_with_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys)
    assert "does not fit: conv-seq: K=1 is even: net2, net3\n" in text
    assert "does not fit: res-par: no blocks: net2, net3\n" in text
    assert "could not be surveyed: cannot trace [Net]: it branches: net10\n" in text
    assert text.endswith("4 models, of which 1 could not be surveyed\n")


def test_a_narrow_terminal_gets_the_table_in_parts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    narrow = lambda: Console(stderr=True, highlight=False, width=50)  # noqa: E731
    monkeypatch.setattr("cadapt.report.listing.stderr_console", narrow)
    lines = shown(capsys).splitlines()
    headings = [line.split() for line in lines if line.startswith("model ")]
    assert headings == [["model", "parameters", "input", "blocks", "convs"], ["model", *SCHEMES]]
    assert max(map(len, lines)) <= 50
    assert sum(line.startswith("net10 ") for line in lines) == 2
