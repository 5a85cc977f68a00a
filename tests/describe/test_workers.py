"""Work shared out among processes: all of it is done, whoever dies, and nobody stays behind."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest

from cadapt.describe.workers import Died, share_out, usable_cores


def square_or_die(number: int) -> int:
    if number < 0:
        os._exit(-number)
    return number * number


def shared_out(numbers: list[int], processes: int) -> dict[int, int | Died]:
    found: dict[int, int | Died] = {}
    share_out(square_or_die, numbers, processes, found.__setitem__)
    assert multiprocessing.active_children() == []
    return found


def test_every_item_is_done() -> None:
    assert shared_out([3, 1, 2], 2) == {1: 1, 2: 4, 3: 9}
    assert shared_out([], 2) == {}


def test_the_others_go_on_where_one_dies() -> None:
    assert shared_out([-7, 1, 2, 3], 2) == {-7: Died(exit_code=7), 1: 1, 2: 4, 3: 9}


def test_where_none_is_left_the_rest_is_told() -> None:
    assert shared_out([-7, 1], 1) == {-7: Died(exit_code=7), 1: Died(exit_code=None)}


def test_an_interruption_ends_the_processes_and_keeps_the_handler() -> None:
    def interrupted(number: int, result: int | Died) -> None:
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        share_out(square_or_die, [1, 2, 3], 2, interrupted)
    assert multiprocessing.active_children() == []
    assert signal.getsignal(signal.SIGINT) is before


def test_there_is_a_core() -> None:
    assert usable_cores() >= 1
