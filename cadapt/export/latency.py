"""How long exported models take in onnxruntime, compared in paired runs so that a shared machine's noise cancels.

Every turn times every model on the same input, in random order; what is reported is each model's time over the base's
in the same turn. Timing and statistics are apart, so that each can be judged on made-up times.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast, get_args, get_type_hints

import torch
from torch import nn

from cadapt.errors import UsageError
from cadapt.export.convert import INPUT_NAME
from cadapt.export.extras import WRITING, require_packages
from cadapt.export.pipeline import onnx_bytes
from cadapt.export.read import describe_model
from cadapt.export.verify import make_images, open_session
from cadapt.merging.report import Latency, ModelLatency
from cadapt.preprocessing import Preprocessing

BASE = "base"
SECONDS = 20.0
TURNS = 400
FEWEST_TURNS = 15

_NAMES = get_args(get_type_hints(ModelLatency)["name"])
_LEAST_SECONDS = 0.005  # a shorter timing is as much the clock's and the scheduler's as the model's
_NARROW = 0.0025  # of the median ratio's own spread: an eighth of the 2 % that are asked about
_SPREAD_OF_MEDIAN = 0.93  # √(π/2) ∕ 1.349: the median's standard error, in interquartile ranges over √n

Progress = Callable[[str], None]


def compare_models(
    models: Mapping[str, nn.Module],
    *,
    preprocessing: Preprocessing,
    classes: Sequence[str],
    batch_size: int = 1,
    threads: int | None = None,
    seconds: float = SECONDS,
    on_progress: Progress | None = None,
) -> Latency:
    """Export models to ONNX, each verified against torch, and measure them against each other.

    Args:
        models: by name: ``base``, which the others are compared to, and any of ``adapted``, ``simplified`` and
            ``merged``. :func:`cadapt.merging.forms.forms_of` gives those of a merge.
        preprocessing: input size, means and deviations.
        classes: class names in the order of all models' outputs.
        batch_size: pictures at once.
        threads: of onnxruntime within an operator; None for as many as torch uses.
        seconds: about the most to spend on measuring; the exports come on top.
        on_progress: called with a line of what is being done.

    Raises:
        UsageError: there is no ``base``, a name is another, or a number is too small.
        CadaptError: a package is missing, or a model cannot be exported.
    """
    _check(models, batch_size=batch_size, turns=TURNS, threads=threads)
    tell = on_progress or (lambda line: None)
    files: dict[str, bytes] = {}
    for name, model in models.items():
        tell(f"exporting the {name} model to ONNX")
        files[name], _ = onnx_bytes(model, preprocessing=preprocessing, classes=classes, name=name)
    tell(f"timing {len(files)} models in onnxruntime, {seconds:.0f} s at most")
    return measure_latency(
        files, input_size=preprocessing.input_size, batch_size=batch_size, threads=threads, seconds=seconds
    )


def measure_latency(
    models: Mapping[str, bytes],
    *,
    input_size: tuple[int, int, int],
    batch_size: int = 1,
    turns: int = TURNS,
    threads: int | None = None,
    seconds: float = SECONDS,
) -> Latency:
    """Measure ONNX files against each other on the CPU.

    Args:
        models: the files' bytes, as :func:`cadapt.export.onnx_bytes` gives them, by name as in :func:`compare_models`.
        input_size: channels, height and width.
        batch_size: pictures at once.
        turns: the most turns; fewer are taken once the ratios are known to a quarter of a percent.
        threads: of onnxruntime within an operator, for all models; None for as many as torch uses.
        seconds: about the most to spend; :data:`FEWEST_TURNS` turns are taken in any case.

    Raises:
        UsageError: there is no ``base``, a name is another, or a number is too small.
        CadaptError: a package is missing, or onnxruntime does not accept a file.
    """
    _check(models, batch_size=batch_size, turns=turns, threads=threads)
    require_packages(WRITING, "measure latency")
    import onnxruntime

    count = threads or torch.get_num_threads()
    given = {INPUT_NAME: _make_input(input_size, batch_size)}
    runs = {
        name: partial(open_session(data, "default", threads=count).run, None, given) for name, data in models.items()
    }
    taken = take_turns(runs, turns=turns, seconds=seconds)
    nodes = {name: _count_nodes(data) for name, data in models.items()}
    return Latency(
        models=tuple(summarise(name, taken, nodes=nodes[name], size_bytes=len(data)) for name, data in models.items()),
        batch_size=batch_size,
        turns=len(taken[BASE]),
        threads=count,
        runtime=f"onnxruntime {onnxruntime.__version__}, CPU",
    )


def take_turns(
    runs: Mapping[str, Callable[[], object]],
    *,
    turns: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Time each run once per turn, in an order drawn anew for each turn.

    Returns:
        Seconds of one run by name; entry i of each belongs to turn i. It ends when the ratios to :data:`BASE` are
        narrow, at ``turns``, or after ``seconds``, whichever is first, but never before :data:`FEWEST_TURNS`.
    """
    repeats = {name: _calibrate(run, clock) for name, run in runs.items()}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    order, draw, started = list(runs), random.Random(seed), clock()
    for turn in range(1, turns + 1):
        draw.shuffle(order)
        for name in order:
            taken[name].append(_time(runs[name], repeats[name], clock))
        if turn >= FEWEST_TURNS and (clock() - started >= seconds or _is_narrow(taken)):
            break
    return taken


def _calibrate(run: Callable[[], object], clock: Callable[[], float]) -> int:
    """Warm a run up, and say how often it is to be repeated for one timing."""
    run()
    run()
    return max(1, math.ceil(_LEAST_SECONDS / max(_time(run, 1, clock), 1e-9)))


def _time(run: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    # not timed: it fetches its weights into the caches, and lets the last model's threads stop waiting for work
    run()
    start = clock()
    for _ in range(repeats):
        run()
    return (clock() - start) / repeats


def _is_narrow(taken: Mapping[str, Sequence[float]]) -> bool:
    return all(spread_of_median(ratios_of(taken, name)) <= _NARROW for name in taken if name != BASE)


def ratios_of(taken: Mapping[str, Sequence[float]], name: str) -> list[float]:
    """A model's time over the base's, turn by turn."""
    return [own / base for own, base in zip(taken[name], taken[BASE], strict=True)]


def spread_of_median(values: Sequence[float]) -> float:
    """The standard error of the median, from the quartiles, so that single disturbed turns do not count."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return _SPREAD_OF_MEDIAN * (high - low) / math.sqrt(len(values))


def summarise(name: str, taken: Mapping[str, Sequence[float]], *, nodes: int, size_bytes: int) -> ModelLatency:
    """One model's figures from all models' seconds; entry i of each belongs to turn i, and there are two at least."""
    low, middle, high = statistics.quantiles(ratios_of(taken, name), n=4, method="inclusive")
    return ModelLatency(
        name=cast("Any", name),
        milliseconds=1000 * statistics.median(taken[name]),
        ratio=middle,
        ratio_low=low,
        ratio_high=high,
        nodes=nodes,
        bytes=size_bytes,
    )


def _check(models: Mapping[str, object], *, batch_size: int, turns: int, threads: int | None) -> None:
    if BASE not in models:
        raise UsageError(f"latency is measured against the model '{BASE}', got {', '.join(models) or 'no model'}")
    unknown = [name for name in models if name not in _NAMES]
    if unknown:
        raise UsageError(f"unknown model '{unknown[0]}' to measure, expected {', '.join(_NAMES)}")
    least = {"batch_size": (batch_size, 1), "turns": (turns, 2), "threads": (1 if threads is None else threads, 1)}
    for what, (number, smallest) in least.items():
        if number < smallest:
            raise UsageError(f"{what} {number}, expected at least {smallest}")


def _make_input(input_size: tuple[int, int, int], batch_size: int) -> Any:
    plain = Preprocessing(input_size=input_size, mean=(0.5,) * input_size[0], std=(0.25,) * input_size[0])
    return make_images(batch_size, plain, normalized=True).numpy()


def _count_nodes(data: bytes) -> int:
    import onnx

    return describe_model(onnx.load_model_from_string(data)).nodes
