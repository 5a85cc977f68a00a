"""Remembers which picture files were decoded without a fault, so that no later run decodes them only to see that.

A file is known again by its path, size and time of change. The memory is one file for each folder of pictures, in the
user's cache folder; it is a convenience, so nothing here ever fails a run. The check of pictures uses it. Imports no
torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import time
from collections.abc import Iterable
from pathlib import Path

import PIL

from cadapt.errors import CadaptError
from cadapt.files import write_atomically
from cadapt.version import __version__

CACHE_VARIABLE = "CADAPT_CACHE"
_OFF = ("0", "off", "no")
_VERSION = 1
# another decoder, or another way to use it, may judge otherwise
_JUDGE = f"cadapt {__version__}, Pillow {PIL.__version__}"
# a file that was written this short a time ago may be written again and show the same time of change
_SETTLED_NS = 2_000_000_000

_LOG = logging.getLogger(__name__)

Stamp = tuple[int, int]
"""A file's size in bytes and its time of change in nanoseconds."""


class Verdicts:
    """What is known of the files below one folder: those that were whole pictures, each with its stamp then.

    Only good news is kept: what makes a file unreadable, a permission or a disk, may change without the file.

    Args:
        root: the folder that the names are relative to.
    """

    def __init__(self, root: Path) -> None:
        self._root = os.path.realpath(root)
        self._file = _own_file(self._root)
        self._known = {} if self._file is None else _read(self._file, self._root)
        self._fresh: dict[str, Stamp] = {}

    def stamp(self, name: str) -> Stamp | None:
        """Return a file's stamp, to be taken before it is read; None if it cannot be had or be relied on."""
        try:
            status = os.stat(f"{self._root}/{name}")  # noqa: PTH116  (a third of Path.stat, for each file of a source)
        except OSError:
            return None  # whoever reads the file will say why
        settled = time.time_ns() - status.st_mtime_ns > _SETTLED_NS
        return (status.st_size, status.st_mtime_ns) if settled else None

    def is_good(self, name: str, stamp: Stamp | None) -> bool:
        """Tell whether the file was a whole picture when it had this stamp."""
        return stamp is not None and self._known.get(name) == stamp

    def remember(self, name: str, stamp: Stamp | None) -> None:
        """Note that the file with this stamp is a whole picture; threads may call it side by side."""
        if stamp is not None:
            self._fresh[name] = stamp

    def save(self, names: Iterable[str]) -> None:
        """Write what is known of the files of these names; of others it is forgotten."""
        if self._file is None or not self._fresh:
            return
        # taken first: threads go on noting meanwhile, and what they note is for the next time
        fresh, self._fresh = self._fresh, {}
        merged = {**self._known, **fresh}
        self._known = {name: merged[name] for name in names if name in merged}
        record = {"version": _VERSION, "judge": _JUDGE, "root": self._root, "good": self._known}
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file, json.dumps(record).encode(), overwrite=True)
        except (CadaptError, OSError) as error:
            _LOG.debug("cannot remember which pictures of %s are good: %s", self._root, error)


def _own_file(root: str) -> Path | None:
    """Where the verdicts are kept, unless what is there is no file.

    A cache folder may be shared, by way of the variable: a link that another user left there would have us write
    wherever it points, and a pipe would have us wait.
    """
    path = _file_for(root)
    try:
        return path if path is None or stat.S_ISREG(path.lstat().st_mode) else None
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            _LOG.debug("no use of %s: %s", path, error)
        return path


def _file_for(root: str) -> Path | None:
    """Where the verdicts on a folder's pictures are kept; None if the user wants none kept, or has no home."""
    named = os.environ.get(CACHE_VARIABLE, "")
    if named.lower() in _OFF:
        return None
    name = hashlib.sha256(root.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    if named:
        return Path(named).absolute() / "pictures" / f"{name}.json"
    configured = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # the XDG specification has relative paths ignored
        cache = Path(configured) if Path(configured).is_absolute() else Path.home() / ".cache"
    except RuntimeError as error:
        _LOG.debug("no cache folder: %s", error)
        return None
    return cache / "cadapt" / "pictures" / f"{name}.json"


def _read(path: Path, root: str) -> dict[str, Stamp]:
    """The stamps of a folder's good files; none where nothing was kept, it is damaged, or another decoder judged."""
    try:
        record = json.loads(path.read_bytes())
        if (record["version"], record["judge"], record["root"]) != (_VERSION, _JUDGE, root):
            return {}
        return {name: (int(size), int(changed)) for name, (size, changed) in record["good"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        _LOG.debug("judging anew the pictures of %s: %s", root, error)
        return {}
