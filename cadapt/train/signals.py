"""Turns SIGINT and SIGTERM into a request to stop, so that a run ends between two steps with everything saved."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any


class StopRequest:
    """A context manager that notes the first SIGINT or SIGTERM in ``received``.

    A second SIGINT quits at once with KeyboardInterrupt. Handlers are installed in the main thread only (Python
    allows no other), and the previous ones come back at the end. Children forked in between, such as a loader's
    workers, inherit the handlers: there, SIGINT is left to the parent and SIGTERM ends the child.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._owner = os.getpid()
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not installed from Python and cannot be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        received = signal.Signals(number)
        if os.getpid() != self._owner:
            if received is signal.SIGTERM:
                os._exit(128 + number)
            return
        if received is signal.SIGINT and self.received is signal.SIGINT:
            raise KeyboardInterrupt
        self.received = received
