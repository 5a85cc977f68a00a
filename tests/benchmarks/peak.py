"""Peak memory of one contender's steps over what there was before the first, model and data included.

It therefore holds gradients and optimizer state as well as what autograd keeps. On a CPU it is the growth of the
resident set of a fresh process, ``python -m tests.benchmarks.peak CASE NAME THREADS``; on a GPU torch's allocator
tells.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.case import Case, make_batches, make_model
from tests.benchmarks.contenders import Runner, make_runner

STEPS = 3
_REPOSITORY = Path(__file__).resolve().parents[2]
_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"


def measure_peak(case: Case, contender: str, *, threads: int) -> dict[str, Any]:
    """Return ``peak_bytes`` over ``base_bytes``, and ``source``, from a fresh process.

    ``peak_bytes`` is None, and ``reason`` says why, where that process failed or this system does not tell.
    """
    command = [sys.executable, "-m", "tests.benchmarks.peak", json.dumps(case.to_json()), contender, str(threads)]
    done = subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        print(done.stderr, file=sys.stderr)
        return {"peak_bytes": None, "reason": lines[-1]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def resident_peak(case: Case, contender: str) -> dict[str, Any]:
    """Measure on the CPU in this process, which should have done nothing else."""
    if not _STATUS.exists():
        return {"peak_bytes": None, "reason": "peak resident memory is read from /proc, which this system has not"}
    runner = make_runner(contender, case, make_model(case))
    batches = make_batches(case)
    gc.collect()
    _trim()
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK, encoding="ascii")
    base = _resident("VmRSS")
    for place in range(STEPS):
        runner.step(*batches[place % len(batches)])
    return {"peak_bytes": _resident("VmHWM") - base, "base_bytes": base, "source": "resident set"}


def allocated_peak(runner: Runner, batch: tuple[Tensor, Tensor], base: int) -> dict[str, Any]:
    """Take a step of a warm runner on a GPU; ``base`` are the bytes allocated before its first one."""
    device = batch[0].device
    torch.cuda.reset_peak_memory_stats(device)
    runner.step(*batch)
    peak = torch.cuda.max_memory_allocated(device)
    return {"peak_bytes": peak - base, "base_bytes": base, "source": "allocator"}


def _trim() -> None:
    """Have the C library give back what building the model left free: steps would grow into it unseen."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def _resident(field: str) -> int:
    """A field of /proc/self/status, which counts in kibibytes, in bytes."""
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {field} in {_STATUS}")


def _main() -> None:
    parser = argparse.ArgumentParser(description="peak memory of one contender, as a line of JSON")
    parser.add_argument("case", help="a case as JSON")
    parser.add_argument("contender")
    parser.add_argument("threads", type=int)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(resident_peak(Case(**json.loads(options.case)), options.contender)))


if __name__ == "__main__":
    _main()
