"""What a forged plan may say of an adapter, and what it gets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cadapt.errors import RefusedError
from cadapt.making import read_insertion
from cadapt.plan import Insertion
from cadapt.planning import plan_insertions
from tests.models import surveyed


def insertion_of(scheme: str) -> Insertion:
    backbone, sites = surveyed("plain")
    return plan_insertions(backbone, scheme, surveyed=sites).insertions[0]


@pytest.mark.parametrize(
    ("scheme", "change", "said"),
    [
        ("lora", {"scheme": "lorra"}, "unknown scheme 'lorra'"),
        ("lora", {"scheme": "bias", "config": {}}, "bias does not join a conv site"),
        ("lora", {"form": "sequential"}, "lora does not join a conv site in the form 'sequential'"),
        ("consolidator", {"form": "sequential"}, "does not join"),
        ("consolidator", {"scheme": "vpt", "config": {}}, "vpt does not join a linear site"),
        ("consolidator", {"config": {"groups": [0]}}, "groups is 0"),
        ("consolidator", {"config": {"groups": "4,x"}}, "groups is '4,x'"),
        ("lora", {"config": {"rank": [1]}}, r"rank is \[1\]"),
        ("lora", {"config": {"depth": 3}}, "no setting 'depth'"),
        ("conv-par", {"config": {"kernel": 4}}, "K=4 cannot keep the grid"),
    ],
)
def test_a_forged_insertion_is_refused_in_one_line(scheme: str, change: dict[str, Any], said: str) -> None:
    insertion = insertion_of(scheme)
    assert read_insertion(insertion)[0].name == scheme
    with pytest.raises(RefusedError, match=said) as refusal:
        read_insertion(replace(insertion, **change))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("trait", ["plain", "windowed", "tokens", "layer-scaled", "dense"])
def test_what_schemes_choose_is_what_they_say_they_join(trait: str) -> None:
    from cadapt.adapters import SCHEMES

    for scheme in SCHEMES.values():
        for item in scheme.select(surveyed(trait)[1].sites, scheme.configure({})):
            assert (item.site.kind, item.form) in scheme.joins, scheme.name
