from __future__ import annotations

import pytest
from rich.text import Text

from cadapt.describe.model import ModelSummary
from cadapt.report.console import literal, printable
from cadapt.report.describe import show_facts, show_model


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Maine Coon é 猫 👩‍🔬", "Maine Coon é 猫 👩‍🔬"),
        ("\x1b]0;pwned\x07", r"\x1b]0;pwned\x07"),
        ("\x9b2J\x7f", r"\x9b2J\x7f"),
        ("cat\ncadapt: error: no\r", r"cat\ncadapt: error: no\r"),
        ("gnp.\u202eexe", r"gnp.\u202eexe"),
        ("caf\udce9", r"caf\udce9"),
    ],
)
def test_what_a_terminal_would_obey_is_shown(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_markup_in_foreign_text_means_nothing() -> None:
    assert Text.from_markup(literal("[red]cat[/] \x1b[0m")).plain == r"[red]cat[/] \x1b[0m"


def test_facts_within_facts_and_long_ones(capsys: pytest.CaptureFixture[str]) -> None:
    show_facts("file\x1b[2J", {"tensors": 2, "metadata": {"name\x07": "resnet18 [b]", "long": "x" * 5000}})
    shown = capsys.readouterr().err
    assert "\x1b" not in shown and "\x07" not in shown
    assert r"metadata: name\x07" in shown and "resnet18 [b]" in shown
    assert shown.count("x" * 10) <= 110 and "…" in shown


def test_a_model_without_sites_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    summary = ModelSummary(name="m", parameters=1, macs=1, input_size=(3, 8, 8), stages=(), sites=(), schemes=())
    show_model(summary, sites=False)
    assert "sites: none" in capsys.readouterr().err
