"""Peak memory of one contender's steps, in a process of its own: ``python -m tests.benchmarks.peak CASE NAME THREADS``.

On a CPU the growth of the resident set over what it was before the first step, model and data included; on a GPU the
same of torch's allocator. Both therefore hold gradients and optimizer state as well as what autograd keeps.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.case import Case, make_batches, make_model
from tests.benchmarks.contenders import make_runner
from tests.benchmarks.timing import synchronise

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


def peak_of(case: Case, contender: str) -> dict[str, Any]:
    """Measure in this process, which should have done nothing else."""
    if case.device == "cpu" and not _STATUS.exists():
        return {"peak_bytes": None, "reason": "peak resident memory is read from /proc, which this system has not"}
    runner = make_runner(contender, case, make_model(case))
    batches = make_batches(case)
    gc.collect()
    device = torch.device(case.device)
    base = _reset(device)
    for place in range(STEPS):
        runner.step(*batches[place % len(batches)])
    synchronise(device)
    peak = _peak(device)
    source = "allocator" if device.type == "cuda" else "resident set"
    return {"peak_bytes": peak - base, "base_bytes": base, "source": source}


def _reset(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK, encoding="ascii")
    return _resident("VmRSS")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _resident("VmHWM")


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
    print(json.dumps(peak_of(Case(**json.loads(options.case)), options.contender)))


if __name__ == "__main__":
    _main()
