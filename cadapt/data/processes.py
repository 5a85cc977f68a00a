"""Keeps a run's signals away from the processes it starts: Ctrl-C and termination are the run's own business.

The check of pictures beside a training run and the loaders' workers use it. Imports no torch.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_STOP_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM})


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back while a process starts, so that none reaches it before it is prepared."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent() -> None:
    """In the new process: leave Ctrl-C to the parent, and let a termination end it without the parent's handlers."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)


def outlive_once(signum: int, _frame: object) -> None:
    """Handle a first termination by waiting for a second.

    The first may be sent to the whole process group (timeout, systemd and Slurm do that): the parent hears it as well,
    saves, and ends its readers itself; one that died before would break the step in which the parent is.
    """
    signal.signal(signum, signal.SIG_DFL)
