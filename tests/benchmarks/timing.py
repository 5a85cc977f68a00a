"""Step times of several contenders, interleaved in one process: A B C … A B C …, so that what disturbs the machine
disturbs all; they are compared by the median of the ratios within a round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tests.benchmarks.contenders import Runner

WARMUP_STEPS = 2


def warm_up(runner: Runner, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Take the steps that come with set-up: compilation, choice of kernels, optimizer state."""
    for place in range(WARMUP_STEPS):
        runner.losses.append(float(runner.step(*batches[place % len(batches)])))


def time_steps(
    runners: Mapping[str, Runner], batches: Sequence[tuple[Tensor, Tensor]], repeats: int
) -> dict[str, list[float]]:
    """Return the seconds of ``repeats`` steps of each warm runner; entry i of each belongs to round i."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for round_ in range(repeats):
        images, labels = batches[round_ % len(batches)]
        for name, runner in runners.items():
            seconds[name].append(_timed(runner, images, labels))
    return seconds


def _timed(runner: Runner, images: Tensor, labels: Tensor) -> float:
    synchronise(images.device)
    start = time.perf_counter()
    loss = runner.step(images, labels)
    synchronise(images.device)
    elapsed = time.perf_counter() - start
    runner.losses.append(float(loss))
    return elapsed


def synchronise(device: torch.device) -> None:
    """Wait for a GPU to finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    """Return the median over rounds of ``slower`` / ``faster``: how many times as fast the second is."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))
