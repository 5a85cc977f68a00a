"""Bounds on an evaluation: what is read, what is refused with which words, what counts as missed."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from cadapt.errors import UsageError
from cadapt.thresholds import METRICS, Threshold, check_thresholds, parse_thresholds

RESULT = SimpleNamespace(top1=0.9, top5=None, mean_per_class=0.8, ece=0.04, loss=0.5, images_per_second=100.0)


def test_numbers_and_percent() -> None:
    assert parse_thresholds(["top1=0.9", " ece = 5% ", "loss=1.5"]) == (
        Threshold(metric="top1", bound=0.9, kind="at least"),
        Threshold(metric="ece", bound=0.05, kind="at most"),
        Threshold(metric="loss", bound=1.5, kind="at most"),
    )
    assert parse_thresholds([]) == ()


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("top-1=0.9", "unknown metric 'top-1'", "did you mean top1"),
        ("speed=3", "unknown metric 'speed'", "known: ece"),
        ("top1", "has no value", "top1=0.9"),
        ("top1=high", "no number after '='", "top1=90%"),
        ("top1=", "no number after '='", "top1=90%"),
        ("top1=90", "is above 1", "try top1=90%"),
        ("top1=900", "is above 1", None),
        ("top1=101%", "is above 1", None),
        ("loss=5%", "not a share", "loss=1.5"),
        ("ece=nan", "finite", None),
        ("top1=-0.1", "finite number from 0", None),
    ],
)
def test_refusals_name_the_mistake(text: str, message: str, hint: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        parse_thresholds([text])
    assert message in caught.value.message
    assert caught.value.hint is None if hint is None else hint in str(caught.value.hint)


def test_met_and_missed() -> None:
    assert check_thresholds(RESULT, parse_thresholds(["top1=90%", "ece=0.04", "loss=0.5", "images_per_second=1"])) == []
    missed = check_thresholds(RESULT, parse_thresholds(["top1=0.91", "ece=0.03", "mean_per_class=0.8", "top5=0.5"]))
    assert missed == [
        "top1 is 0.9, expected at least 0.91",
        "ece is 0.04, expected at most 0.03",
        "top5 was not measured, expected at least 0.5",
    ]


def test_near_misses_are_told_apart_and_nan_is_missed() -> None:
    near = SimpleNamespace(top1=0.899999, loss=float("nan"))
    missed = check_thresholds(near, parse_thresholds(["top1=0.9", "loss=1"]))
    assert missed == ["top1 is 0.899999, expected at least 0.9", "loss is nan, expected at most 1"]


def test_every_metric_is_a_field_of_the_result() -> None:
    from dataclasses import fields

    from cadapt.evaluation import EvalResult

    assert set(METRICS) <= {field.name for field in fields(EvalResult)}


def test_reading_thresholds_imports_no_torch() -> None:
    code = "import sys, cadapt.thresholds as t; t.parse_thresholds(['top1=90%']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
