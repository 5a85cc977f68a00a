from __future__ import annotations

from math import cos, pi

import pytest

from cadapt.train import Schedule, TrainConfig
from cadapt.train.schedule import schedule_of, warmup_epochs_of


def test_closed_form():
    schedule = Schedule(lr=1e-3, min_lr=1e-6, warmup_steps=10, total_steps=100)
    for step in range(100):
        expected = 1e-3 * (step + 1) / 10
        if step >= 10:
            expected = 1e-6 + (1e-3 - 1e-6) * (1 + cos(pi * (step - 10) / 89)) / 2
        assert schedule.lr_at(step) == pytest.approx(expected, rel=1e-12)
    assert schedule.lr_at(9) == schedule.lr_at(10) == 1e-3
    assert schedule.lr_at(99) == pytest.approx(1e-6, rel=1e-9)


def test_it_never_rises_after_the_warm_up():
    schedule = Schedule(lr=1.0, min_lr=0.0, warmup_steps=3, total_steps=50)
    rates = [schedule.lr_at(step) for step in range(50)]
    assert rates[:3] == sorted(rates[:3])
    assert rates[3:] == sorted(rates[3:], reverse=True)


@pytest.mark.parametrize("total", [1, 2])
def test_the_shortest_runs(total):
    schedule = Schedule(lr=1.0, min_lr=0.0, warmup_steps=0, total_steps=total)
    assert schedule.lr_at(0) == 1.0


@pytest.mark.parametrize(("epochs", "expected"), [(100, 10), (40, 10), (39, 3), (10, 1), (5, 0)])
def test_a_long_warm_up_is_cut(epochs, expected):
    assert warmup_epochs_of(TrainConfig(epochs=epochs)) == expected
    assert schedule_of(TrainConfig(epochs=epochs), 7).warmup_steps == 7 * expected
