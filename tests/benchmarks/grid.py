"""Runs the contenders over cases and gives one row of figures for each pair, as JSON objects.

A contender that cannot run has a row with the reason; one that breaks has a row too, and its traceback goes to stderr,
so that hours of other measurements are not lost with it.
"""

from __future__ import annotations

import gc
import statistics
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.case import Case, make_batches, make_model
from tests.benchmarks.contenders import CONTENDERS, Runner, make_runner
from tests.benchmarks.peak import allocated_peak, measure_peak
from tests.benchmarks.saved_bytes import SavedBytes, count_saved_bytes
from tests.benchmarks.timing import time_steps, warm_up
from tests.benchmarks.unavailable import Unavailable

Row = dict[str, Any]
Batch = tuple[Tensor, Tensor]


def run_case(case: Case, contenders: Sequence[str], *, repeats: int, peaks: bool) -> list[Row]:
    """Measure the contenders on one case.

    Args:
        case: the case.
        contenders: names, in the order in which they take their turns.
        repeats: timed rounds.
        peaks: whether to measure peak memory on a CPU, in a process for each contender; on a GPU it is free.
    """
    model, batches = make_model(case), make_batches(case)
    runners: dict[str, Runner] = {}
    rows: dict[str, Row] = {}
    for name in contenders:
        rows[name] = {**case.to_json(), "contender": name, "what": CONTENDERS[name].what}
        runner = _admit(name, case, model, batches, rows[name])
        if runner is not None:
            runners[name] = runner
        else:
            release()
    for name, seconds in time_steps(runners, batches, repeats).items():
        rows[name].update(_time_figures(seconds, case.batch))
        rows[name]["losses"] = runners[name].losses
    del model, runners, batches
    release()
    if peaks and case.device == "cpu":
        threads = torch.get_num_threads()
        for name, row in rows.items():
            if row["status"] == "ok":
                row["peak"] = measure_peak(case, name, threads=threads)
    return list(rows.values())


def _admit(name: str, case: Case, model: torch.nn.Module, batches: Sequence[Batch], row: Row) -> Runner | None:
    """Build, count and warm up one contender; write into ``row`` what was found, or why there is none."""
    try:
        runner = make_runner(name, case, model)
        parameters = [parameter for parameter in runner.trained.model.parameters() if parameter.requires_grad]
        row["trainable_parameters"] = sum(parameter.numel() for parameter in parameters)
        base = allocated(case)
        warm_up(runner, batches)
        if base is not None:
            row["peak"] = allocated_peak(runner, batches[0], base)
        row["saved"] = count(runner, batches[0])
    except Unavailable as reason:
        row.update(status="unavailable", reason=str(reason))
    except Exception as error:
        row.update(status="failed", reason=report_failure(error))
    else:
        row.update(status="ok", note=runner.trained.note)
        return runner
    return None


def count(runner: Runner, batch: Batch) -> Row:
    """Return the bytes that one of the runner's steps keeps for its backward pass, as a JSON object.

    ``allocated_bytes`` is what the GPU's allocator makes of it, an independent count, logits and rounding included.
    """
    saved: SavedBytes = count_saved_bytes(
        lambda: runner.loss(*batch), runner.modules, see_hidden=not runner.contender.compiled
    )
    found = {"bytes": saved.total, "hooked_bytes": saved.hooked, "hidden_bytes": saved.hidden}
    before = allocated(runner.case)
    if before is None:
        return found
    loss = runner.loss(*batch)
    found["allocated_bytes"] = torch.cuda.memory_allocated(loss.device) - before
    return found


def allocated(case: Case) -> int | None:
    """Return the bytes that are allocated on the GPU, None on a CPU."""
    return torch.cuda.memory_allocated(case.device) if case.device.startswith("cuda") else None


def report_failure(error: Exception) -> str:
    """Print an error's traceback to stderr and return a line about it, for the row."""
    traceback.print_exception(error, file=sys.stderr)
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _time_figures(seconds: Sequence[float], batch: int) -> Row:
    median = statistics.median(seconds)
    return {"step_seconds": list(seconds), "median_step_seconds": median, "images_per_second": batch / median}


def release() -> None:
    """Give back what the last case left: models, compiled code, the GPU's cache."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
