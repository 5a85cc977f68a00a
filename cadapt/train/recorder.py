"""Writes what a run leaves behind: lines of metrics, TensorBoard curves where it is installed, and saved weights."""

from __future__ import annotations

import importlib.util
import platform
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch

from cadapt.train.folder import MetricsLog, RunFolder
from cadapt.version import __version__


class Recorder:
    """The open files of a run folder; without a folder every method does nothing.

    Args:
        run: the folder, or None.
        metrics_bytes: bytes of ``metrics.jsonl`` to keep.
        steps_done: optimizer steps up to which TensorBoard's earlier curves hold.
    """

    def __init__(self, run: RunFolder | None, *, metrics_bytes: int = 0, steps_done: int = 0) -> None:
        self._metrics = None if run is None else MetricsLog(run.metrics, metrics_bytes)
        self._curves = None if run is None else _open_curves(run.tensorboard, steps_done)

    def write(self, record: Mapping[str, Any], steps_done: int) -> None:
        """Append one line of metrics."""
        if self._metrics is not None:
            self._metrics.write(record)
        if self._curves is not None:
            for name, value in record.items():
                if isinstance(value, float):
                    self._curves.add_scalar(f"{record['kind']}/{name}", value, steps_done)

    def sync(self) -> int:
        """Put the lines onto the disk and return their length in bytes."""
        return 0 if self._metrics is None else self._metrics.sync()

    def close(self) -> None:
        """Close the files."""
        if self._metrics is not None:
            self._metrics.close()
        if self._curves is not None:
            self._curves.close()


def versions() -> dict[str, str]:
    """Return the versions of what computes a run's numbers."""
    return {
        "python": platform.python_version(),
        "cadapt": __version__,
        "torch": str(torch.__version__),
        "timm": str(timm.__version__),
    }


def _open_curves(folder: Path, steps_done: int) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    with warnings.catch_warnings():
        # tensorboard's own imports warn about its dependencies, which is nothing the user can mend
        warnings.simplefilter("ignore")
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(folder), purge_step=steps_done)  # type: ignore[no-untyped-call]
