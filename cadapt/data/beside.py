"""Checks a source's pictures in a process of its own while training goes on, at the system's lowest priority.

To decode every picture takes a minute for tens of thousands, which nobody should wait through before the first step.
:func:`cadapt.data.source.open_training_data` starts the check, the job looks at it between batches. Imports no torch.
"""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from time import monotonic
from typing import TypeVar

from cadapt.data.folder import Images
from cadapt.data.images import BadImage, UnreadableImage, check_each
from cadapt.data.processes import leave_signals_to_parent, signals_held_back
from cadapt.data.readable import Pictures, UnreadableImages
from cadapt.errors import CadaptError

CHECKED_AHEAD = 256
"""Sources of no more pictures are checked before a run begins: it takes a moment, and nothing has to be undone."""
_LOWEST_PRIORITY = 19
_SECONDS_BETWEEN_NOTES = 60.0

_Batch = TypeVar("_Batch")
_Found = list[tuple[int, BadImage]]


class CheckBeside:
    """The check of every picture of a source, going on in another process until :meth:`close`.

    Args:
        parts: the parts of one source.
        workers: threads that decode, in that process.
    """

    def __init__(self, parts: Sequence[Images], workers: int) -> None:
        self._total = sum(len(images) for images in parts)
        self._done = 0
        self._found: _Found = []
        self._reports, sender = multiprocessing.Pipe(duplex=False)
        ends = sender, self._reports
        self._process = multiprocessing.Process(target=_check_all, args=(parts, workers, *ends), daemon=True)
        with signals_held_back(), warnings.catch_warnings():
            # Python 3.12 warns of every fork beside threads; this one decodes pictures and nothing else
            warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
            self._process.start()
        sender.close()  # so that the end of the process is the end of its reports

    @property
    def finished(self) -> bool:
        """Whether every picture has been judged, as far as :meth:`look` and :meth:`finish` have seen."""
        return self._done == self._total

    def look(self) -> None:
        """Take in what the check has found by now, without waiting.

        Raises:
            UnreadableImages: some pictures cannot be read; it names those found so far, :meth:`finish` names all.
            CadaptError: the process died.
        """
        while not self.finished and self._reports.poll():
            self._take_report()
        self._refuse_found()

    def finish(self) -> None:
        """Wait for the rest of the check; raises as :meth:`look` does."""
        while not self.finished:
            self._take_report()
        self._refuse_found()

    def watched(self, batches: Iterator[_Batch]) -> Iterator[_Batch]:
        """Yield the batches, and look at the check before each; raises as :meth:`look` does."""
        self.look()
        for batch in batches:
            yield batch
            self.look()

    def close(self) -> None:
        """End the process, whether or not it is done."""
        if self._process.is_alive() and not self.finished:
            self._process.terminate()
        self._process.join()
        self._reports.close()

    def _take_report(self) -> None:
        try:
            report = self._reports.recv()
        except EOFError:
            raise CadaptError(
                f"the check of pictures died after {self._done} of {self._total}",
                hint="it may have been out of memory: try fewer --workers, or --workers 0",
            ) from None
        if isinstance(report, BaseException):
            raise report
        self._done, found = report
        self._found += found

    def _refuse_found(self) -> None:
        if self._found:
            raise UnreadableImages([bad for _, bad in sorted(self._found, key=lambda item: item[0])], self._total)


def _check_all(parts: Sequence[Images], workers: int, sender: Connection, reports: Connection) -> None:
    """What the process does: send how many pictures are judged and which were found unreadable, now and then."""
    leave_signals_to_parent()
    reports.close()  # so that the end of the run, killed or not, is the end of their reader
    if hasattr(os, "nice"):
        os.nice(_LOWEST_PRIORITY)
    pictures = Pictures(parts)
    found: _Found = []
    sent, noted_at = 0, monotonic()

    def judge(index: int) -> None:
        try:
            pictures.check(index)
        except UnreadableImage as error:
            found.append((index, BadImage(path=error.path, reason=error.reason)))

    def report(done: int, total: int) -> None:
        nonlocal sent, noted_at
        if done == total or monotonic() - noted_at > _SECONDS_BETWEEN_NOTES:
            pictures.remember()
            noted_at = monotonic()
        news = found[sent:]  # threads may append meanwhile
        sent += len(news)
        sender.send((done, news))

    try:
        check_each(len(pictures), judge, workers, report)
    except BrokenPipeError:
        return  # the run has ended, and nobody wants to know
    except Exception as error:  # the system's refusals, of memory or open files: the run has to say so
        sender.send(error)
