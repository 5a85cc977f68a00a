"""The figures of a scheme, counted adapter by adapter, are those of the adapted model as a whole."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from cadapt.adapters import SCHEMES
from cadapt.costing import cost
from cadapt.describe.model import summarise
from cadapt.describe.schemes import SchemeSummary, all_schemes, read_schemes
from cadapt.errors import UsageError
from cadapt.plan import Plan
from cadapt.planning import plan_insertions
from cadapt.surgery import operate
from tests.contract.cases import planned
from tests.models import BASES, surveyed

TRAITS = ("plain", "class-token", "windowed", "same-padded")
JOINED = "consolidator+bias+norm"


SHARES = (0, 1)
"""Of all schemes every other one, from the first or from the second."""


@functools.cache
def summarised(trait: str, share: int) -> dict[str, SchemeSummary]:
    summary = summarise(surveyed(trait)[0], (*all_schemes(), JOINED)[share :: len(SHARES)])
    return {item.name: item for item in summary.schemes}


def in_shares(test: Callable[[str, int], None]) -> Callable[[str, int], None]:
    """A test of each base with half of the schemes one day, and the other half the next."""
    for name, values in (("trait", TRAITS), ("share", SHARES)):
        test = pytest.mark.parametrize(name, values)(test)
    return pytest.mark.in_turn(len(SHARES))(test)


@in_shares
def test_every_scheme_fits_or_says_why_not(trait: str, share: int) -> None:
    schemes = summarised(trait, share)
    assert list(schemes) == [*SCHEMES, JOINED][share :: len(SHARES)]
    for name in SCHEMES.keys() & schemes.keys():
        assert (schemes[name].reason is None) == isinstance(planned(trait, name), Plan), name


@in_shares
def test_figures_are_those_of_the_whole_model(trait: str, share: int) -> None:
    schemes = summarised(trait, share)
    backbone, sites = surveyed(trait)
    size = backbone.preprocessing.input_size
    base = cost(backbone.model, size, training=False)
    for summary in schemes.values():
        if summary.reason is not None:
            continue
        plan = plan_insertions(backbone, summary.name, surveyed=sites)
        whole = cost(operate(backbone, plan, sites), size, batch=2)
        assert (summary.sites, summary.tensors) == (len(plan.insertions), len(plan.deltas) + len(plan.trainable))
        assert summary.parameters == whole.trainable_parameters, summary.name
        assert summary.macs_added == whole.macs - base.macs, summary.name
        assert summary.activation_bytes == whole.activation_bytes // 2, summary.name
        # on a base this small a few small tensors more may be kept where nothing large is saved
        assert summary.engine_activation_bytes <= 1.02 * summary.activation_bytes, summary.name
        assert summary.merged + sum(item.adapters for item in summary.merge_reasons) == summary.sites


def test_a_sum_of_schemes_that_does_not_fit_says_which() -> None:
    (summary,) = summarise(surveyed("plain")[0], ("lora+convpass",)).schemes
    assert (summary.reason or "").startswith("convpass: it has no attention")


def test_activations_of_a_batch() -> None:
    backbone = surveyed("plain")[0]
    (one,), (many,) = (summarise(backbone, ("conv-par",), batch=batch).schemes for batch in (None, 6))
    for name in ("activation_bytes", "engine_activation_bytes"):
        # what does not grow with the batch is shared by two pictures in one figure, and counted once in the other
        assert 5 * getattr(one, name) < getattr(many, name) <= 6 * getattr(one, name)
    assert 0 < one.engine_activation_bytes < one.activation_bytes / 2


def test_names_come_apart_at_commas() -> None:
    assert read_schemes(["lora,ssf", "bias+norm", "lora"]) == ("lora", "ssf", "bias+norm")
    assert read_schemes([]) == ()
    with pytest.raises(UsageError, match="unknown scheme 'lorra'"):
        read_schemes(["lorra"])


def test_the_traits_are_bases() -> None:
    assert set(TRAITS) <= set(BASES)
