"""``state.pt``: the single source from which a run goes on.

It holds the weights too, though they are in ``last.safetensors`` as well: a run killed between the two writes would
otherwise go on with the weights of one step and the optimizer of another. Behind torch's own bytes stands their
SHA-256: torch does not check what it reads, and with one flipped bit it would be another run that goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch

from cadapt.checkpoints import first_line
from cadapt.errors import RefusedError, UsageError
from cadapt.files import write_atomically
from cadapt.train.config import FREE_AT_RESUME, TrainConfig
from cadapt.train.hardware import resolve_precision

STATE_VERSION = 2
_DIGEST_BYTES = hashlib.sha256().digest_size


_DAMAGED_HINT = "begin the run anew; the weights beside it, last.safetensors and best.safetensors, stand alone"


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write the state and its digest atomically: tensors, numbers, strings and containers of them only."""
    buffer = BytesIO()
    torch.save({"version": STATE_VERSION, **state}, buffer)
    content = buffer.getbuffer()

    def write(file: BinaryIO) -> None:
        file.write(content)
        file.write(hashlib.sha256(content).digest())

    write_atomically(path, write, overwrite=True)


def read_state(path: Path) -> dict[str, Any]:
    """Read a state back, on the CPU, without running any code that the file may hold.

    Raises:
        RefusedError: the file is damaged, holds something else, or is of another version.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RefusedError(f"'{path}' cannot be read: {error.strerror}") from error
    content, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        raise RefusedError(f"'{path}' is damaged: its content does not match its SHA-256", hint=_DAMAGED_HINT)
    try:
        state = torch.load(BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # forged bytes make the unpickler fail in any way
        raise RefusedError(f"'{path}' holds no state: {first_line(error)}", hint=_DAMAGED_HINT) from error
    version = state.get("version") if isinstance(state, dict) else None
    if version != STATE_VERSION:
        raise RefusedError(f"'{path}' has state version {version!r}, expected {STATE_VERSION}")
    return dict(state)


def precision_of(config: TrainConfig, state: Mapping[str, Any], device: torch.device) -> str:
    """Return a run's precision; a resumed one keeps its own, also where ``auto`` would now be another.

    Args:
        config: the settings.
        state: what the run goes on from; empty for a new run.
        device: where it runs now.

    Raises:
        UsageError: the device has none such.
    """
    if not state:
        return resolve_precision(config.precision, device)
    try:
        return resolve_precision(state["precision"], device)
    except UsageError as error:
        hint = f"resume on a device such as the run's: {state['computed_by']['device']}"
        raise UsageError(f"cannot resume: {error.message}", hint=hint) from error


def changes_since(state: Mapping[str, Any], computed_by: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a line for each thing that computes, and rounds, differently from what computed the run so far."""
    return tuple(
        f"{name} is {now}, was {state['computed_by'].get(name)} before: "
        "the run goes on in good order, but not bit for bit as it would have"
        for name, now in computed_by.items()
        if state["computed_by"].get(name) != now
    )


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
