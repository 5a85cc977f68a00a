"""A run's parts and their common state: made from the settings, saved to the run folder, loaded from it again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cadapt.errors import UsageError
from cadapt.files import write_atomically
from cadapt.train.checkpoint import changes_since, check_same_run, precision_of, read_state, write_state
from cadapt.train.config import TrainConfig
from cadapt.train.folder import RunFolder, write_record
from cadapt.train.hardware import describe_device, resolve_device
from cadapt.train.ledger import Ledger
from cadapt.train.meter import Meter
from cadapt.train.protocols import FitData, PrepareForward, SaveWeights
from cadapt.train.randomness import random_state, restore_random_state
from cadapt.train.recorder import Recorder, versions
from cadapt.train.schedule import schedule_of
from cadapt.train.stepper import Stepper, not_finite
from cadapt.train.weights import Learnt, tensor_file

if TYPE_CHECKING:
    from cadapt.train.protocols import Batch


class Session:
    """Everything one call of ``fit`` works with.

    Args:
        model: moved to the device, and put into training mode.
        data, config, run, save_weights, prepare_forward: as given to ``fit``.

    ``notices`` are what the user should read before the run goes on.

    Raises:
        UsageError: nothing to train, no training images, or no such device, or one without the resumed run's precision.
        RefusedError: the run folder's state is damaged, or of other data or another model.
    """

    def __init__(
        self,
        model: nn.Module,
        data: FitData,
        config: TrainConfig,
        run: RunFolder | None,
        save_weights: SaveWeights | None,
        prepare_forward: PrepareForward | None = None,
    ) -> None:
        self.data, self.config, self.run = data, config, run
        self._save_weights = save_weights
        self.device = resolve_device(config.device)
        self.steps = ceil(data.train.steps_per_epoch / config.accumulate)
        if self.steps == 0:
            raise UsageError("there are no training images")
        # as it will be after a round trip through the saved state
        self._data_record = json.loads(json.dumps(data.record))
        state = self._read_state()
        self.precision = precision_of(config, state, self.device)
        self.model = _placed(model, self.device, config.channels_last)
        self.schedule = schedule_of(config, self.steps)
        self.learnt = Learnt(self.model)
        classes = len(data.classes)
        # without it the setting has nothing to act on
        self._memory = "plain" if prepare_forward is None else config.memory
        forward = self.model if prepare_forward is None else prepare_forward(self.model, self.precision)
        self.stepper = Stepper(
            self.model,
            self.learnt,
            config,
            class_count=classes,
            device=self.device,
            precision=self.precision,
            forward=forward,
        )
        self.ledger = Ledger()
        self.epoch_meter, self.interval_meter = Meter(self.device), Meter(self.device)
        self.best_tensors: dict[str, Tensor] = {}
        self.notices: tuple[str, ...] = ()
        if state:
            self._load(state)
        self.recorder = Recorder(run, metrics_bytes=state.get("metrics_bytes", 0), steps_done=self.steps_done)
        if run is not None and not run.resume:
            write_record(run, self._run_record(run))
        self._counted_until = monotonic()
        self.saved_at = self._counted_until

    @property
    def steps_done(self) -> int:
        """Optimizer steps of the whole run so far."""
        return self.ledger.epoch * self.steps + self.ledger.step

    @property
    def lr(self) -> float:
        """Learning rate of the last step taken."""
        return self.schedule.lr_at(max(0, self.steps_done - 1))

    def take_step(self, batches: Sequence[Batch]) -> None:
        """Take the next optimizer step on ``batches``; the ledger is moved on by the caller."""
        self.stepper.step(
            batches,
            lr=self.schedule.lr_at(self.steps_done),
            epoch=self.ledger.epoch,
            step=self.ledger.step,
            steps_done=self.steps_done + 1,
            meters=(self.epoch_meter, self.interval_meter),
        )

    def count_seconds(self) -> None:
        """Bring the ledger's time up to now."""
        now = monotonic()
        self.ledger.seconds += now - self._counted_until
        self._counted_until = now

    def check_finite(self) -> None:
        """Check that neither the losses since the last check nor the weights are ruined; this waits for the device.

        Raises:
            CadaptError: they are.
        """
        means = self.epoch_meter.read()
        if means.images and not abs(means.loss) < float("inf"):
            raise not_finite("the loss", self.steps_done, self.lr)
        broken = self.learnt.first_broken()
        if broken is not None:
            raise not_finite(f"trainable tensor '{broken}'", self.steps_done, self.lr)

    def save_best(self) -> None:
        """Write ``best.safetensors``; call it while the model holds the weights to keep."""
        if self.run is not None:
            self._write_weights(self.run.best)

    def save(self) -> None:
        """Write ``last.safetensors`` and ``state.pt``; without a run folder, only check.

        Raises:
            CadaptError: weights or losses are ruined, so that what was saved before is better.
        """
        self.check_finite()
        self.saved_at = monotonic()
        if self.run is None:
            return
        self.count_seconds()
        with self.stepper.averaged():
            self._write_weights(self.run.last)
        write_state(self.run.state, self._state())

    def _write_weights(self, path: Path) -> None:
        record = self._weights_record()
        if self._save_weights is None:
            write_atomically(path, tensor_file(self.learnt.capture(), record), overwrite=True)
        else:
            self._save_weights(path, self.model, record)

    def _state(self) -> dict[str, Any]:
        return {
            "config": self.config.to_json(),
            "precision": self.precision,
            "computed_by": self._computed_by(),
            "data": self._data_record,
            "steps_per_epoch": self.steps,
            "ledger": self.ledger.to_state(),
            "tensors": self.learnt.capture(),
            "best_tensors": self.best_tensors,
            "stepper": self.stepper.state(),
            "meters": [self.epoch_meter.state(), self.interval_meter.state()],
            "random": random_state(),
            "metrics_bytes": self.recorder.sync(),
        }

    def _computed_by(self) -> dict[str, Any]:
        return {
            "device": describe_device(self.device),
            "compile": self.config.compile,
            "memory": self._memory,
            "torch": str(torch.__version__),
        }

    def _read_state(self) -> dict[str, Any]:
        """Return the state to go on from, checked; empty for a new run."""
        if self.run is None or not self.run.resume:
            return {}
        state = read_state(self.run.state)
        check_same_run(state, self.config, self._data_record, self.steps)
        return state

    def _load(self, state: dict[str, Any]) -> None:
        self.notices = changes_since(state, self._computed_by())
        self.learnt.restore(state["tensors"])
        self.stepper.load_state(state["stepper"])
        self.ledger = Ledger(**state["ledger"])
        self.best_tensors = state["best_tensors"]
        for meter, saved in zip((self.epoch_meter, self.interval_meter), state["meters"], strict=True):
            meter.load_state(saved)
        restore_random_state(state["random"])

    def _run_record(self, run: RunFolder) -> dict[str, Any]:
        return {
            "config": self.config.to_json(),
            "data": self._data_record,
            "classes": list(self.data.classes),
            "device": str(self.device),
            "precision": self.precision,
            "versions": versions(),
            "command": list(run.command),
        }

    def _weights_record(self) -> dict[str, Any]:
        # no times and no paths: equal runs write equal files
        return {
            "config": self.config.to_json(),
            "data": self._data_record,
            "seed": self.config.seed,
            "epochs": self.ledger.epoch,
            "steps": self.steps_done,
            "metrics": dict(self.ledger.final),
            "precision": self.precision,
            "versions": versions(),
        }


def _placed(model: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    model.to(device=device)
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.train()
