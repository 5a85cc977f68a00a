"""The run folder: where a run keeps its record, its lines of metrics, its weights and what it needs to go on.

``run.json`` says what was asked, ``metrics.jsonl`` what came of it, ``best`` and ``last.safetensors`` hold the weights,
``state.pt`` the rest. Imports no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cadapt.errors import RefusedError, UsageError
from cadapt.files import write_atomically


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A folder for one run.

    Args:
        path: the folder; it is made if need be.
        resume: go on with the run that is in it.
        force: begin anew over the run that is in it.
        command: the command line, for the record.
    """

    path: Path
    resume: bool = False
    force: bool = False
    command: tuple[str, ...] = ()

    @property
    def record(self) -> Path:
        """What was asked: settings, data, versions, command."""
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def best(self) -> Path:
        """The best epoch's weights."""
        return self.path / "best.safetensors"

    @property
    def last(self) -> Path:
        """The weights at the last save."""
        return self.path / "last.safetensors"

    @property
    def state(self) -> Path:
        """All that a resumed run reads."""
        return self.path / "state.pt"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files, where it is installed."""
        return self.path / "tb"


def prepare(run: RunFolder) -> None:
    """Make the folder ready: empty of another run for a new one, with a state in it for a resumed one.

    Raises:
        UsageError: there is a run already and neither ``resume`` nor ``force`` was asked for, or none to resume.
    """
    if run.resume:
        if not run.state.is_file():
            raise UsageError(f"no run to resume in '{run.path}': {run.state.name} is missing")
        return
    own = [run.record, run.metrics, run.best, run.last, run.state, *run.tensorboard.glob("events.out.tfevents.*")]
    present = [path for path in own if path.exists()]
    if present and not run.force:
        raise UsageError(
            f"'{run.path}' holds a run already ({present[0].name})",
            hint="go on with it by --resume, begin anew over it by --force, or name another folder",
        )
    for path in present:
        path.unlink()
    run.path.mkdir(parents=True, exist_ok=True)


def write_record(run: RunFolder, record: Mapping[str, Any]) -> None:
    """Write ``run.json``."""
    text = json.dumps(record, indent=2, sort_keys=True) + "\n"
    write_atomically(run.record, text.encode(), overwrite=True)


class MetricsLog:
    """Appends lines to ``metrics.jsonl``, and knows how many bytes of it belong to the saved state.

    Args:
        path: the file.
        length: bytes to keep; what a killed run wrote after its last save is cut off, and will be written again.

    Raises:
        RefusedError: the file is shorter than the saved state says.
    """

    def __init__(self, path: Path, length: int = 0) -> None:
        present = path.stat().st_size if path.exists() else 0
        if present < length:
            raise RefusedError(f"'{path}' has {present} bytes, expected the {length} of the saved state")
        self._file = path.open("ab")
        self._file.truncate(length)
        self.length = length

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line; it is visible to others at once."""
        line = json.dumps(record).encode() + b"\n"
        self._file.write(line)
        self._file.flush()
        self.length += len(line)

    def sync(self) -> int:
        """Put what was written onto the disk, and return the file's length in bytes."""
        os.fsync(self._file.fileno())
        return self.length

    def close(self) -> None:
        """Close the file."""
        self._file.close()
