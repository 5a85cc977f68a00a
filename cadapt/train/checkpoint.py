"""``state.pt``: the single source from which a run goes on.

It holds the weights too, though they are in ``last.safetensors`` as well: a run killed between the two writes would
otherwise go on with the weights of one step and the optimizer of another.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cadapt.errors import RefusedError, UsageError
from cadapt.files import write_atomically
from cadapt.train.config import FREE_AT_RESUME, TrainConfig

STATE_VERSION = 1


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write the state atomically: tensors, numbers, strings and containers of them only."""
    record = {"version": STATE_VERSION, **state}
    write_atomically(path, lambda file: torch.save(record, file), overwrite=True)


def read_state(path: Path) -> dict[str, Any]:
    """Read a state back, on the CPU, without running any code that the file may hold.

    Raises:
        RefusedError: the file is damaged, holds something else, or is of another version.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise RefusedError(f"'{path}' cannot be read: {str(error).splitlines()[0]:.120}") from error
    version = state.get("version") if isinstance(state, dict) else None
    if version != STATE_VERSION:
        raise RefusedError(f"'{path}' has state version {version!r}, expected {STATE_VERSION}")
    return dict(state)


def check_same_run(state: Mapping[str, Any], config: TrainConfig, data: Mapping[str, Any], steps: int) -> None:
    """Check that a state belongs to a run with these settings on these data.

    Raises:
        UsageError: a setting that changes the run's numbers differs.
        RefusedError: the data differ.
    """
    wanted = config.to_json()
    for name, saved in state["config"].items():
        if name not in FREE_AT_RESUME and wanted.get(name) != saved:
            raise UsageError(
                f"cannot resume: the run has {name} {saved!r}, got {wanted.get(name)!r}",
                hint="resume with the run's own settings, or begin a new run",
            )
    if state["steps_per_epoch"] != steps:
        raise RefusedError(f"cannot resume: the data give {steps} steps per epoch, expected {state['steps_per_epoch']}")
    for name in sorted(state["data"].keys() | data.keys()):
        if state["data"].get(name) != data.get(name):
            raise RefusedError(
                f"cannot resume: the data are not those of the run: {name} is {data.get(name)!r:.80}, "
                f"expected {state['data'].get(name)!r:.80}"
            )
