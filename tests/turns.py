"""Cases that take turns: of a large product of traits and schemes a run takes a share, and days in a row take all.

``@pytest.mark.in_turn(3)`` runs each case every third day, and ``--zoo full`` or a test's own name (``FILE::TEST``)
all of them at once. ``CADAPT_ZOO_SEED`` stands for the day, as it does in the tests of the zoo.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

MARKER = "in_turn(days): a case of a product that is run every so many days, and each day by --zoo full"


def today() -> int:
    """The number of the day, or the one that ``CADAPT_ZOO_SEED`` names."""
    return int(os.environ.get("CADAPT_ZOO_SEED") or datetime.datetime.now(datetime.UTC).date().toordinal())


def has_its_turn(positions: Sequence[int], days: int, day: int) -> bool:
    """Whether a case is one of a day's.

    Args:
        positions: for each argument the position of the case's value among all that the argument takes.
        days: after how many days it is the case's turn again.
        day: the number of the day.
    """
    # a sum, so that neighbours in every argument have their turn on different days: a day leaves out no value
    return (sum(positions) + day) % days == 0


def take_turns(items: Sequence[pytest.Item], day: int) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Part collected tests into those of a day and those of other days."""
    values = _values(items)
    ours: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        marker = item.get_closest_marker("in_turn")
        positions = [values[_test(item)][name].index(_key(value)) for name, value in _arguments(item).items()]
        (ours if marker is None or has_its_turn(positions, marker.args[0], day) else others).append(item)
    return ours, others


def _values(items: Sequence[pytest.Item]) -> dict[str, dict[str, list[str]]]:
    """For every test that takes turns the values of each argument, in the order in which they come."""
    found: dict[str, dict[str, list[str]]] = {}
    for item in items:
        named = found.setdefault(_test(item), {})
        for name, value in _arguments(item).items():
            seen = named.setdefault(name, [])
            if _key(value) not in seen:
                seen.append(_key(value))
    return found


def _test(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def _key(value: object) -> str:
    return repr(value)


def _arguments(item: pytest.Item) -> Mapping[str, Any]:
    if item.get_closest_marker("in_turn") is None:
        return {}
    arguments: Mapping[str, Any] = item.callspec.params  # type: ignore[attr-defined]
    return arguments
