"""Cases in turn: every day has every value of every argument, and days in a row have every case once."""

from __future__ import annotations

import itertools

import pytest

from tests.turns import has_its_turn, take_turns, today

pytest_plugins = ["pytester"]


@pytest.mark.parametrize(("sizes", "days"), [((20, 20), 3), ((2, 20, 2), 2), ((3, 20), 3), ((5, 3, 2), 2), ((4, 2), 2)])
def test_days_in_a_row_take_all_cases_and_each_takes_all_values(sizes: tuple[int, ...], days: int) -> None:
    cases = list(itertools.product(*map(range, sizes)))
    taken = [[case for case in cases if has_its_turn(case, days, day)] for day in range(100, 100 + days)]
    assert sorted(itertools.chain(*taken)) == cases
    for share in taken:
        assert [{case[place] for case in share} for place in range(len(sizes))] == [set(range(n)) for n in sizes]


_SUITE = """
import pytest

@pytest.mark.in_turn(2)
@pytest.mark.parametrize("base", ["plain", "dense"])
@pytest.mark.parametrize("scheme", ["bias", "lora"])
def test_products(base, scheme):
    pass

@pytest.mark.parametrize("base", ["plain", "dense"])
def test_others(base):
    pass
"""


def test_products_are_parted_by_the_values_of_their_arguments(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nmarkers =\n    in_turn(days): some days")
    items, _ = pytester.inline_genitems(pytester.makepyfile(_SUITE))
    even, odd = ([item.name for item in take_turns(items, day)[0]] for day in (0, 1))
    always = ["test_others[plain]", "test_others[dense]"]
    assert even == ["test_products[bias-plain]", "test_products[lora-dense]", *always]
    assert odd == ["test_products[bias-dense]", "test_products[lora-plain]", *always]
    assert [item.name for item in take_turns(items, 0)[1]] == odd[:2]


def test_a_number_stands_for_the_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CADAPT_ZOO_SEED", "17")
    assert today() == 17
