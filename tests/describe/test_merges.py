"""What is said of merging before training is what merging does after it, adapter by adapter."""

from __future__ import annotations

import pytest

from cadapt.adapters import SCHEMES
from cadapt.describe.merges import MergeRules
from cadapt.merging import merge
from cadapt.meta import meta_copy
from cadapt.plan import Plan
from tests.contract.cases import planned
from tests.merging.cases import trained
from tests.models import surveyed

# a conv of its own kind each, and one layer that is called twice
TRAITS = ("plain", "grouped", "weight-standardised", "reused", "class-token")
PLACING = [name for name, scheme in SCHEMES.items() if scheme.places_modules]
CASES = [
    pytest.param(trait, name, id=f"{trait}-{name}")
    for trait in TRAITS
    for name in PLACING
    if isinstance(planned(trait, name), Plan)
]


@pytest.mark.in_turn(2)
@pytest.mark.parametrize(("trait", "scheme"), CASES)
def test_the_rules_say_before_training_what_merging_does_after(trait: str, scheme: str) -> None:
    plan = planned(trait, scheme)
    assert isinstance(plan, Plan)
    backbone, sites = surveyed(trait)
    told = MergeRules(meta_copy(backbone.model), sites).ask(plan)
    _, report = merge(trained(trait, scheme))
    assert [reason is None for reason in told] == [row.status == "exact" for row in report.sites]


def test_asking_changes_no_weights() -> None:
    backbone, sites = surveyed("plain")
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    plan = planned("plain", "res-par")
    assert isinstance(plan, Plan)
    assert None not in MergeRules(backbone.model, sites).ask(plan)
    assert all(tensor.equal(before[name]) for name, tensor in backbone.model.state_dict().items())
