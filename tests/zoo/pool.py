"""Worker processes that take one architecture at a time, and whose death is that architecture's failure only."""

from __future__ import annotations

import gc
import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

Task = tuple[str, dict[str, Any]]
Record = dict[str, Any]


def run_pool(
    work: Callable[..., Record],
    tasks: Sequence[Task],
    *,
    jobs: int,
    limit_gb: float,
    limit_seconds: float,
    prepare: Callable[[], None] | None = None,
) -> Iterator[Record]:
    """Yield ``work(name, **arguments)`` for each task, in the order in which they finish.

    Args:
        work: an importable function. An error it raises becomes the record's ``error``.
        tasks: names with arguments.
        jobs: how many processes.
        limit_gb: what one process may hold.
        limit_seconds: how long one task may take, by the clock.
        prepare: called once in each process; its time does not count.
    """
    waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)
    done: queue.SimpleQueue[Record] = queue.SimpleQueue()
    threads = [
        threading.Thread(target=_feed, args=(work, prepare, waiting, done, limit_gb, limit_seconds), daemon=True)
        for _ in range(min(jobs, len(tasks)))
    ]
    for thread in threads:
        thread.start()
    for _ in tasks:
        yield done.get()


class _Worker:
    """One process and the way to talk to it."""

    def __init__(self, work: Callable[..., Record], prepare: Callable[[], None] | None, limit_gb: float) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, work, prepare, limit_gb), daemon=True)
        self.process.start()
        # else the death of the process would not be seen as the end of the pipe
        other.close()
        self.ready = False

    def ask(self, task: Task, seconds: float) -> Record | None:
        """The record, or None where the process died or took too long; then it is of no more use."""
        try:
            # imports do not count
            self.ready = self.ready or self.pipe.recv()
            self.pipe.send(task)
            if self.pipe.poll(seconds):
                record: Record = self.pipe.recv()
                return record
        except (EOFError, OSError):
            self.process.join(10)
            return None
        self.process.kill()
        self.process.join()
        return None

    def stop(self) -> None:
        self.pipe.close()
        self.process.join(10)


def _feed(
    work: Callable[..., Record],
    prepare: Callable[[], None] | None,
    waiting: queue.SimpleQueue[Task],
    done: queue.SimpleQueue[Record],
    limit_gb: float,
    limit_seconds: float,
) -> None:
    worker = None
    while True:
        try:
            task = waiting.get_nowait()
        except queue.Empty:
            break
        worker = worker or _Worker(work, prepare, limit_gb)
        record = worker.ask(task, limit_seconds)
        if record is None:
            code = worker.process.exitcode
            record = {"name": task[0], "error": f"the worker died, exit code {code}, or took over {limit_seconds:g} s"}
            worker = None
        done.put(record)
    if worker is not None:
        worker.stop()


def _serve(pipe: Connection, work: Callable[..., Record], prepare: Callable[[], None] | None, limit_gb: float) -> None:
    _limit_memory(limit_gb)
    if prepare is not None:
        prepare()
    # what was imported stays: collecting need not look at it each time
    gc.freeze()
    pipe.send(True)
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            # at an ordinary exit extensions would report the frozen objects as leaked
            os._exit(0)
        reset_peak()
        try:
            record = work(name, **arguments)
        except Exception as error:  # of whatever kind, it is a finding about this architecture
            record = {"name": name, "error": f"{type(error).__name__}: {str(error)[:300]}", "at": _place(error)}
        pipe.send(record)


def _limit_memory(limit_gb: float) -> None:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    size = int(limit_gb * 2**30)
    # private writable memory: a file that is mapped does not count
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def reset_peak() -> None:
    """Let the kernel count this process's peak memory from now on, where it can."""
    try:
        with open("/proc/self/clear_refs", "w") as control:  # noqa: PTH123 - a file of the kernel's
            control.write("5")
    except OSError:
        pass


def _place(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else f"{trace.tb_frame.f_code.co_name}:{trace.tb_lineno}"
