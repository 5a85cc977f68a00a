"""What a merge may lose: read from text without guessing, and held to the picture."""

import pytest

from cadapt.errors import UsageError
from cadapt.tolerance import parse_tolerance


@pytest.mark.parametrize(
    ("text", "metric", "bound", "written"),
    [
        ("top1=0.5%", "top1", 0.005, "top1=0.5%"),
        ("top1 = 0.005", "top1", 0.005, "top1=0.5%"),
        ("disagreement=100%", "disagreement", 1.0, "disagreement=100%"),
        ("logit=0.1", "logit", 0.1, "logit=0.1"),
    ],
)
def test_reading(text: str, metric: str, bound: float, written: str) -> None:
    found = parse_tolerance(text)
    assert (found.metric, found.bound, str(found)) == (metric, pytest.approx(bound), written)
    assert parse_tolerance(str(found)) == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("top1", "has no value"),
        ("top5=1%", "unknown tolerance"),
        ("top1=", "no number"),
        ("top1=0_5%", "no number"),
        ("top1=nan", "no number"),
        ("top1=-1%", "from 0"),
        ("logit=5%", "no share"),
        ("top1=0.5", "50% to be lost"),  # half a percent, most likely
        ("top1=200%", "200% to be lost"),
    ],
)
def test_what_is_not_clear_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        parse_tolerance(text)
    assert "%%" not in str(caught.value.hint)


def test_a_count_of_pictures_is_held_exactly() -> None:
    bound = parse_tolerance("top1=0.5%")
    assert bound.allows(top1_lost=0.98 - 0.975, disagreement=1.0, max_logit_error=9.0)
    assert not bound.allows(top1_lost=3 / 400, disagreement=0.0, max_logit_error=0.0)
    assert not bound.allows(top1_lost=None, disagreement=0.0, max_logit_error=0.0)
    assert not bound.allows(top1_lost=float("nan"), disagreement=0.0, max_logit_error=0.0)
