"""One run at a time in a run folder: a lock that the system lets go of even when the process is killed.

Whoever begins or resumes a :class:`cadapt.jobs.TrainJob` holds its folder meanwhile; the command line does.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cadapt.errors import CadaptError

_LOG = logging.getLogger(__name__)
_LOCK = ".lock"
_HELD = {errno.EAGAIN, errno.EACCES}


def new_folder(wanted: Path) -> Path:
    """Make a folder that nobody had, under the wanted name or with a number after it, and return its path."""
    wanted.parent.mkdir(parents=True, exist_ok=True)
    number, folder = 1, wanted
    while True:
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
            folder = wanted.with_name(f"{wanted.name}-{number}")
        else:
            return folder


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder; one that is still empty in the end is removed.

    Raises:
        CadaptError: another run is at work in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _LOCK
    descriptor = _lock(path)
    if descriptor is None:
        message = f"another cadapt train is at work in '{folder}'"
        raise CadaptError(message, hint="wait until it has ended, or begin elsewhere: --run DIR")
    try:
        yield
    finally:
        if sys.platform == "win32":  # nothing is removed there while it is open
            os.close(descriptor)
            path.unlink(missing_ok=True)
        else:  # after the closing, the file may be another's
            path.unlink(missing_ok=True)
            os.close(descriptor)
        _remove_if_empty(folder)


def _lock(path: Path) -> int | None:
    """Open and lock a file; None if another process holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if not _take(descriptor):
            os.close(descriptor)
            return None
        # the run that had it may have removed it between the opening and the locking
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
        os.close(descriptor)


def _take(descriptor: int) -> bool:
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        # of this process alone: a lock by flock would live on in the reader processes of a run that was killed
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        _LOG.debug("no locks here: %s", error)
    return True


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError as error:
        _LOG.debug("kept %s: %s", folder, error)
