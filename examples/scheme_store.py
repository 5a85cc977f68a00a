"""Where the comparison's runs are made and kept: a file of JSON lines, and a few processes that add to it.

A run is found again by all that its outcome depends on (``scheme_runs.Job.key``), so that the same command goes on
where it was stopped, and another number of epochs or other weights begin anew beside what is there.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from scheme_runs import Job, run_job

Record = dict[str, Any]


class Runs:
    """The runs made so far, in a file of JSON lines that is only ever added to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: dict[str, Record] = {}
        if path.exists():
            # a line without its end is a run whose writing was cut off
            complete = path.read_text(encoding="utf-8").rpartition("\n")[0]
            path.write_text(complete + "\n" if complete else "", encoding="utf-8")
            for line in complete.splitlines():
                record = json.loads(line)
                self._records[record["job"]] = record

    def find(self, jobs: Iterable[Job]) -> list[Record]:
        """Return the records of those jobs that were made."""
        names = [_name(job) for job in jobs]
        return [self._records[name] for name in names if name in self._records]

    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        """Return the jobs that have yet to end well: what was refused or broke may have been mended since."""
        return [job for job in jobs if self._records.get(_name(job), {}).get("status") not in ("done", "diverged")]

    def add(self, job: Job, record: Record) -> None:
        """Keep a run's record, on disk before anything else happens."""
        record = {"job": _name(job), **record}
        self._records[record["job"]] = record
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _name(job: Job) -> str:
    return hashlib.sha256(json.dumps(job.key(), sort_keys=True).encode()).hexdigest()[:24]


def run_all(jobs: Sequence[Job], runs: Runs, workers: int, label: str) -> None:
    """Make the runs that are missing, several at once, saying on stderr what became of each."""
    missing = runs.missing(jobs)
    started = time.monotonic()
    for done, (job, record) in enumerate(_outcomes(missing, workers), start=1):
        runs.add(job, record)
        figure = f"val {record['val_top1']:.1%}" if record["status"] == "done" else record["reason"]
        place = f"{label} {done}/{len(missing)} {time.monotonic() - started:.0f} s"
        what = f"{job.backbone} {job.scheme} seed {job.seed} lr {job.lr:g}"
        print(f"[{place}] {what}: {record['status']}, {figure}", file=sys.stderr, flush=True)


def _outcomes(jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, Record]]:
    if workers <= 1:
        yield from ((job, run_job(job)) for job in jobs)
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # for the workers: each has a core
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(run_job, job): job for job in jobs}
        try:
            yield from ((futures[future], future.result()) for future in as_completed(futures))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
