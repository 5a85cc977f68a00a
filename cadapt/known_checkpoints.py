"""Where the checkpoints of known bases were last seen on this computer.

An adapter file names its base's checkpoint by file name and hash, never by a path of somebody's machine. This index
in the user's cache folder finds the file again; it is a convenience, so nothing here ever fails a command.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from cadapt.errors import CadaptError
from cadapt.files import write_atomically

INDEX_VERSION = 1

_LOG = logging.getLogger(__name__)


def remember_checkpoint(sha256: str, path: str | Path) -> None:
    """Note that the base whose tensors hash to ``sha256`` is in the checkpoint at ``path``.

    A damaged index is rebuilt; where the cache cannot be written, nothing is remembered.
    """
    location = str(Path(path).absolute())
    try:
        index = _index_path()
        known = _read_index(index)
        if known.get(sha256) == location:
            return
        record = {"version": INDEX_VERSION, "checkpoints": {**known, sha256: location}}
        index.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(index, json.dumps(record, sort_keys=True, indent=1).encode(), overwrite=True)
    except (CadaptError, OSError, RuntimeError) as error:
        _LOG.debug("cannot remember checkpoint %s: %s", location, error)


def recall_checkpoint(sha256: str) -> Path | None:
    """Return where the checkpoint of a base was last seen, if a file is still there.

    The file may have changed since: whoever loads it compares the hash.
    """
    try:
        location = _read_index(_index_path()).get(sha256)
        path = None if location is None else Path(location)
        return path if path is not None and path.is_file() else None
    except (OSError, RuntimeError, ValueError) as error:
        _LOG.debug("cannot recall checkpoint %s: %s", sha256, error)
        return None


def _index_path() -> Path:
    configured = os.environ.get("XDG_CACHE_HOME", "")
    # the XDG specification has relative paths ignored
    cache = Path(configured) if Path(configured).is_absolute() else Path.home() / ".cache"
    return cache / "cadapt" / "checkpoints.json"


def _read_index(index: Path) -> dict[str, str]:
    """The index, or an empty one where there is none or it is damaged."""
    try:
        record = json.loads(index.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        _LOG.debug("rebuilding the damaged index %s: %s", index, error)
        return {}
    known = record.get("checkpoints") if isinstance(record, dict) else None
    if not isinstance(known, dict):
        return {}
    return {key: value for key, value in known.items() if isinstance(value, str)}
