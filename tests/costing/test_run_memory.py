"""The forecast of a run: its sums, whether it fits, which batch does, and what the user is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from cadapt.costing import MemoryForecast, StepSetting, fitting_batch, forecast, memory_notices
from cadapt.errors import UsageError

SIZE = (3, 16, 16)
Free = Callable[[int | None], None]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Free:
    """Says how many bytes the device is to have free."""
    return lambda count: monkeypatch.setattr("cadapt.costing.run_memory.free_memory", lambda device: count)


def net() -> nn.Sequential:
    frozen = nn.Conv2d(3, 8, 3, padding=1).requires_grad_(False)
    return nn.Sequential(frozen, nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 2))


def setting(batch: int, accumulate: int = 1) -> StepSetting:
    return StepSetting(input_size=SIZE, batch_size=batch, accumulate=accumulate)


def test_sums(free: Free) -> None:
    free(10**9)
    model = net()
    trained = 4 * sum(item.numel() for item in model.parameters() if item.requires_grad)
    weights = 4 * sum(item.numel() for item in model.parameters())
    known = forecast(model, StepSetting(input_size=SIZE, batch_size=4, average=True))
    assert (known.weights_bytes, known.gradient_bytes) == (weights, trained)
    assert (known.optimizer_bytes, known.average_bytes, known.resident_bytes) == (2 * trained, trained, weights)
    assert known.total_bytes == weights + 3 * trained + known.step_bytes
    assert known.step_bytes > known.activation_bytes > 0
    assert json.loads(json.dumps(known.to_json())) == {**known.to_json(), "fits": True}


def test_what_lies_beside_is_counted_once(free: Free) -> None:
    free(None)
    model = net()
    shared = nn.Sequential(model[1], nn.Conv2d(8, 8, 1))
    alone, both = (forecast(model, setting(2), beside=beside) for beside in ((), (shared,)))
    assert both.weights_bytes - alone.weights_bytes == 4 * (64 + 8)
    assert both.fits is None


def test_weights_elsewhere_are_to_come(free: Free) -> None:
    free(10**9)
    assert forecast(net().to("meta"), setting(2)).resident_bytes == 0


def needed(known: MemoryForecast) -> int:
    return known.total_bytes - known.resident_bytes


def test_the_fewest_parts_that_fit(free: Free) -> None:
    free(None)
    model = net()
    # the truth, tried out: every number of parts of 64 images, gradients kept between them
    sizes = {parts: needed(forecast(model, setting(-(-64 // parts), parts))) for parts in range(1, 8)}
    room = (sizes[3] + sizes[2]) // 2
    free(int(room / 0.8))
    first = forecast(model, setting(64))
    assert first.fits is False
    found = fitting_batch(model, setting(64), first)
    assert found is not None and found.fits
    assert (found.batch_size, found.accumulate) == (22, 3)
    assert fitting_batch(model, setting(64), found) is found


def test_batches_that_are_accumulated_already(free: Free) -> None:
    free(None)
    model = net()
    free(int(needed(forecast(model, setting(16, 8))) / 0.8) + 100)
    found = fitting_batch(model, setting(64, 2), forecast(model, setting(64, 2)))
    assert found is not None
    assert (found.batch_size, found.accumulate) == (16, 8)


def test_no_batch_fits(free: Free) -> None:
    free(1000)
    assert fitting_batch(net(), setting(64), forecast(net(), setting(64))) is None
    (line,) = memory_notices(net(), setting(64))
    assert line.startswith("batches of 64 will hardly fit: they take about ")
    assert line.endswith("and no batch does: try a smaller model or image size")


def test_lines(free: Free) -> None:
    free(None)
    (line,) = memory_notices(net(), setting(64))
    assert line.startswith("batches of 64 take about 2 MB of memory on cpu, 1 MB of it activations")
    free(10**10)
    (line,) = memory_notices(net(), setting(64))
    assert line.endswith("; 10.0 GB are at hand")
    free(10**6)
    (line,) = memory_notices(net(), setting(64))
    assert "where 1 MB are at hand; --batch-size " in line and " --accumulate " in line
    assert line.count("\n") == 0


def test_a_model_that_cannot_be_counted_is_told_and_not_refused() -> None:
    class Reader(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if float(x.sum()) > 0 else -x

    (line,) = memory_notices(Reader(), setting(2))
    assert line.startswith("the memory that this takes is unknown: cannot count Reader for an input of 2×3×16×16")


def test_a_model_that_cannot_be_copied_is_told_too() -> None:
    model = net()
    model.lock = threading.Lock()
    (line,) = memory_notices(model, setting(2))
    assert line.startswith("the memory that this takes is unknown: cannot count Sequential for an input of 2×3×16×16")


def test_where_the_batch_makes_no_difference_it_is_known_at_once(free: Free, monkeypatch: pytest.MonkeyPatch) -> None:
    free(None)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10**6))
    model[2].requires_grad_(True)
    real, counted = forecast, []

    def count(*args: Any, **options: Any) -> MemoryForecast:
        counted.append(real(*args, **options))
        return replace(counted[-1], step_bytes=10**8)

    monkeypatch.setattr("cadapt.costing.run_memory.forecast", count)
    free(10**3)
    assert fitting_batch(model, setting(64), count(model, setting(64))) is None
    assert len(counted) == 3


def test_settings_of_no_sense_are_refused() -> None:
    with pytest.raises(UsageError, match="batch is 0"):
        forecast(net(), setting(0))
