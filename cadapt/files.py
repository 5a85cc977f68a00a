"""Writing a file so that its reader finds the old one or the new one, whole, whatever happens in between.

Every output of cadapt goes through :func:`write_atomically`: a temporary file in the same folder, fsync, rename,
fsync of the folder. Temporary files of killed runs are recognised by their name and a lock nobody holds any more.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import platform
import re
import secrets
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Literal

from cadapt.errors import CadaptError, UsageError

Data = bytes | Callable[[BinaryIO], None]

_LOG = logging.getLogger(__name__)
_PREFIX = ".cadapt-"
_SUFFIX = ".tmp"
_DESCRIPTOR = re.compile(r"(?:/dev/fd|/proc/self/fd)/(\d+)")
_STANDARD_STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2}
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EBADF}


def write_atomically(path: str | Path, data: Data, *, overwrite: bool) -> None:
    """Write a file whole or not at all, with the umask's mode; a file it replaces hands its own mode on.

    A symbolic link is written through: its target is replaced and the link stays. Devices, pipes and names of open
    descriptors (``/dev/stdout``, ``/dev/fd/3``, a fifo) cannot be replaced and are written straight.

    Args:
        path: the output; its folder must exist.
        data: the bytes, or a function that writes them to the binary handle it is given and leaves it open.
        overwrite: replace a file that is there.

    Raises:
        UsageError: the file exists and ``overwrite`` is false, even if it appeared while the data was written.
        CadaptError: the system refused (no such folder, not permitted, disk full …); an old file is as it was.
    """
    try:
        _write(path, data, overwrite=overwrite)
    except OSError as error:
        # a path of its own means that the data's function failed on some other file: not ours to explain
        if error.filename is not None and not _is_ours(error.filename, path):
            raise
        if isinstance(error, FileExistsError):
            raise UsageError(f"'{path}' exists", hint="replace it with --force, or name another output") from error
        raise CadaptError(f"cannot write '{path}': {error.strerror or error}") from error


def _write(path: str | Path, data: Data, *, overwrite: bool) -> None:
    descriptor = _open_straight(path)
    if descriptor is not None:
        with os.fdopen(descriptor, "wb") as handle:
            _fill(handle, data)
        return
    target = _resolve(path)
    if not overwrite and target.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    _remove_stale(target.parent)
    while not _write_beside(target, data, overwrite=overwrite):
        _LOG.debug("another run took the temporary file beside %s for a stale one", target)
    _sync_folder(target.parent)


def _is_ours(name: object, path: str | Path) -> bool:
    """Whether an error's file name is the output, its folder, or a temporary file of this module."""
    named = Path(os.fsdecode(name)) if isinstance(name, str | bytes | os.PathLike) else Path()
    target = Path(path)
    return named.name.startswith(_PREFIX) or named in (target, target.parent, _resolve(target), _resolve(target).parent)


def _open_straight(path: str | Path) -> int | None:
    """A descriptor for what cannot be replaced by a rename, or None for an ordinary or missing file."""
    match = _DESCRIPTOR.fullmatch(str(path))
    number = int(match[1]) if match else _STANDARD_STREAMS.get(str(path))
    if number is not None:
        # a duplicate shares the offset and the append mode of a redirection, which opening by name would not
        return os.dup(number)
    try:
        mode = Path(path).stat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    return None if stat.S_ISREG(mode) else os.open(path, os.O_WRONLY)


def _resolve(path: str | Path) -> Path:
    # unlike Path.resolve, which raises a RuntimeError for a loop of links in some versions of Python
    return Path(os.path.realpath(path))


def _fill(handle: BinaryIO, data: Data) -> None:
    if callable(data):
        data(handle)
    else:
        handle.write(data)
    handle.flush()


def _write_beside(target: Path, data: Data, *, overwrite: bool) -> bool:
    """Write and publish; False, with nothing done, if a clean-up came between the file's creation and its lock."""
    temporary = target.parent / f"{_PREFIX}{_host()}-{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}"
    try:
        # the name is made before the try and the file within it: an exception by signal finds both or neither
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        with os.fdopen(os.open(temporary, flags, 0o666), "wb") as handle:
            if _lock(handle.fileno()) == "held" or not temporary.exists():
                return False
            _fill(handle, data)
            if overwrite:
                _copy_mode(target, temporary)
            os.fsync(handle.fileno())
            if sys.platform == "win32":
                handle.close()  # nothing is renamed there while it is open
            # published while the lock is held: nobody may take the finished file for a stale one
            _publish(temporary, target, overwrite=overwrite)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _copy_mode(target: Path, temporary: Path) -> None:
    """Give the new file the mode of the one it replaces, if there is one."""
    with suppress(FileNotFoundError):
        mode = stat.S_IMODE(target.stat().st_mode)
        if mode != stat.S_IMODE(temporary.stat().st_mode):
            temporary.chmod(mode)


def _publish(temporary: Path, target: Path, *, overwrite: bool) -> None:
    """Give the finished file its name, atomically.

    Raises:
        FileExistsError: something has the name already and must be kept.
    """
    if overwrite:
        temporary.replace(target)
        return
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        # no hard links here (FAT, some network folders): take the name with an empty file, then replace that one
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        try:
            temporary.replace(target)
        except OSError:
            target.unlink()
            raise


def _sync_folder(folder: Path) -> None:
    """Make the rename itself last; file systems that cannot sync a folder are left at that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
        _LOG.debug("cannot sync folder %s: %s", folder, error)


def _host() -> str:
    """Eight characters for this computer: locks of another one in a shared folder may not be seen here."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _lock(descriptor: int) -> Literal["locked", "held", "impossible"]:
    """Lock an open file for as long as it is open; the system lets go of it even when the process is killed."""
    if sys.platform == "win32":
        return "impossible"
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "held"
    except OSError as error:
        _LOG.debug("no locks here: %s", error)
        return "impossible"
    return "locked"


def _remove_stale(folder: Path) -> None:
    """Remove the temporary files that killed runs on this computer left in a folder, as far as it is permitted."""
    for leftover in folder.glob(f"{_PREFIX}{_host()}-*{_SUFFIX}"):
        try:
            descriptor = os.open(leftover, os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0))
            try:
                if _lock(descriptor) == "locked":
                    leftover.unlink(missing_ok=True)
            finally:
                os.close(descriptor)
        except OSError as error:
            _LOG.debug("cannot remove %s: %s", leftover, error)
