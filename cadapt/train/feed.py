"""Tells an error of the data from any other: it comes between two steps, where a run's state is whole and can be saved.

The engine draws all its batches through a :class:`Feed`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

_Batch = TypeVar("_Batch")


class Feed:
    """Passes batches on, and remembers what stopped them."""

    def __init__(self) -> None:
        self._error: Exception | None = None

    def of(self, batches: Iterable[_Batch]) -> Iterator[_Batch]:
        """Yield the batches; an error of theirs is remembered, and goes its way."""
        try:
            yield from batches
        except Exception as error:
            self._error = error
            raise

    @contextmanager
    def saved_if_it_fails(self, save: Callable[[], None]) -> Iterator[None]:
        """Save when batches cannot be had: unreadable pictures, a reader that died, too many open files."""
        try:
            yield
        except Exception as error:
            if error is self._error:
                save()
            raise
