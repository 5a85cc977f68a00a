"""Sharing work out among processes, each of which does one item at a time.

Unlike the pools of the standard library this one knows whose process was killed and goes on with the others, shows
no traceback when it is interrupted, and leaves no process behind, even where this one is killed. Imports no torch,
so that a process comes up quickly and hears of an interruption early.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_SECONDS_TO_END = 5.0


@dataclass(frozen=True, kw_only=True)
class Died:
    """In place of a result: the process that was at it ended, or none was left to do it (then without a code)."""

    exit_code: int | None


def usable_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share_out(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    processes: int,
    done: Callable[[Item, Result | Died], None],
) -> None:
    """Call a function on each item, in processes of their own, and ``done`` with each result as it comes.

    Args:
        function: one that pickle can name; it catches its own errors.
        items: what to call it on.
        processes: how many to start.
        done: called in this process.
    """
    waiting = deque(items)
    workers: list[_Worker[Item, Result]] = []
    try:
        with _ignoring_interrupts():
            for _ in range(min(processes, len(items))):
                workers.append(_Worker(function))
        for worker in workers:
            worker.take(waiting)
        while busy := {worker.connection: worker for worker in workers if worker.item is not None}:
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                item, result = worker.item, worker.result()
                assert item is not None
                worker.item = None
                if not isinstance(result, Died):
                    worker.take(waiting)
                done(item, result)
        for item in waiting:
            done(item, Died(exit_code=None))
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.end()


class _Worker(Generic[Item, Result]):
    """A process, the line to it, and the item it is at."""

    def __init__(self, function: Callable[[Item], Result]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        # with the other end open here too, the end of the process would not be seen
        theirs.close()
        self.item: Item | None = None
        self._send(function)

    def take(self, waiting: deque[Item]) -> None:
        """Begin the next item, if there is one."""
        if waiting:
            self.item = waiting.popleft()
            self._send(self.item)

    def result(self) -> Result | Died:
        """Wait for the item's result."""
        try:
            result: Result = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(_SECONDS_TO_END)
            return Died(exit_code=self.process.exitcode)
        return result

    def end(self) -> None:
        """Wait until the process that was told to end has, but not for ever."""
        self.process.join(_SECONDS_TO_END)
        self.process.kill()
        self.process.join()
        self.connection.close()

    def _send(self, value: object) -> None:
        # a process that is gone is noticed where its result is waited for
        with contextlib.suppress(OSError):
            self.connection.send(value)


def _serve(connection: Connection) -> None:
    """What a process does: the function first, then items, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # by way of an exception, so that what imported packages hold of the system (tqdm a semaphore) is given back
    signal.signal(signal.SIGTERM, _leave)
    with contextlib.suppress(EOFError, OSError):
        function = connection.recv()
        while True:
            connection.send(function(connection.recv()))


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Let processes that are started meanwhile inherit that Ctrl-C, which a terminal sends to all, is not for them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
