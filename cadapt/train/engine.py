"""The loop: ``fit`` trains what a model leaves trainable, and can be stopped and resumed at any step.

Nothing here knows adapters, pictures or file formats. The state after each step is a pure function of the settings and
the data, which is what makes a resumed run equal to one that was never stopped, bit for bit on one machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from time import monotonic, sleep
from typing import Any, NoReturn

import torch
from torch import nn

from cadapt.errors import CadaptError, InterruptedRunError
from cadapt.train.config import TrainConfig
from cadapt.train.events import EpochDone, Event, Notice, RunStarted, Saved, StepDone
from cadapt.train.feed import Feed
from cadapt.train.folder import RunFolder, prepare
from cadapt.train.pace import Pace
from cadapt.train.protocols import FitData, PrepareForward, SaveWeights
from cadapt.train.randomness import seed_step
from cadapt.train.result import TrainResult, thinned
from cadapt.train.schedule import warmup_epochs_of
from cadapt.train.session import Session
from cadapt.train.signals import StopRequest
from cadapt.train.stepper import grouped
from cadapt.train.validation import ValidationStoppedError, validate

# Events for a display are sent at most this often: reading the numbers makes the GPU's queue run dry.
SECONDS_BETWEEN_STEP_EVENTS = 0.5
# How long a signal sent to a run's readers may reach this process after them.
SECONDS_FOR_SIGNALS = 0.1


def fit(
    model: nn.Module,
    data: FitData,
    config: TrainConfig,
    *,
    run: RunFolder | None = None,
    on_event: Callable[[Event], None] | None = None,
    save_weights: SaveWeights | None = None,
    prepare_forward: PrepareForward | None = None,
) -> TrainResult:
    """Train the parameters of ``model`` that require a gradient, and leave the best (or last) weights in it.

    The model is trained in place. It ends on the run's device, in evaluation mode. On one CPU, a run that was killed
    and resumed ends with the same bits as one that was not, with any number of workers; by another device, torch,
    ``compile`` or ``memory`` it goes on in the same precision, and a Notice says that the rounding is another. SIGINT
    and SIGTERM end the run after the current step, with everything saved; a second SIGINT ends it at once.

    Args:
        model: takes images [B, C, H, W] and returns logits [B, classes]; its ``train()`` looks after frozen norms.
        data: training and validation batches.
        config: the settings.
        run: the folder to save into, and to resume from; None saves nothing.
        on_event: called with each event, in the training thread.
        save_weights: writes ``best`` and ``last.safetensors`` into the run folder; None writes the tensors that
            training changes, by name.
        prepare_forward: makes what training runs forward and backward in the model's place; None runs the model.

    Raises:
        UsageError: settings, model, data or run folder do not go together.
        RefusedError: the saved run is damaged, or of other data or another model.
        InterruptedRunError: stopped by a signal.
        CadaptError: the loss is not finite, or memory ran out; what was saved before is sound.
        Exception: whatever the batches raise, after saving.
    """
    if run is not None:
        prepare(run)
    session = Session(model, data, config, run, save_weights, prepare_forward)
    with StopRequest() as stop, closing(session.recorder):
        return _Loop(session, on_event or _ignore, stop).run()


class _Loop:
    def __init__(self, session: Session, emit: Callable[[Event], None], stop: StopRequest) -> None:
        self._session = session
        self._emit = emit
        self._stop = stop
        self._pace = Pace()
        self._event_at = float("-inf")
        self._feed = Feed()

    def run(self) -> TrainResult:
        session = self._session
        self._announce()
        while session.ledger.epoch < session.config.epochs:
            with _memory_explained(session.config), self._feed.saved_if_it_fails(self._save_after_failure):
                self._train_epoch()
                validation = self._validate()
            self._close_epoch(validation)
        return self._finish()

    def _announce(self) -> None:
        session, config = self._session, self._session.config
        self._emit(
            RunStarted(
                epochs=config.epochs,
                steps_per_epoch=session.steps,
                epochs_done=session.ledger.epoch,
                steps_done=session.ledger.step,
                device=str(session.device),
                precision=session.precision,
                trainable_parameters=sum(tensor.numel() for tensor in session.learnt.parameters.values()),
            )
        )
        warmup = warmup_epochs_of(config)
        for message in session.notices:
            self._emit(Notice(message=message))
        if warmup != config.warmup_epochs:
            self._emit(Notice(message=f"warm-up cut from {config.warmup_epochs} to {warmup} of {config.epochs} epochs"))

    def _train_epoch(self) -> None:
        session, ledger, config = self._session, self._session.ledger, self._session.config
        if ledger.step == session.steps:
            return  # resumed when only validation was left
        session.model.train()
        self._pace.start()
        batches = session.data.train.batches(ledger.epoch, start_step=ledger.step * config.accumulate)
        with closing(grouped(self._feed.of(batches), config.accumulate)) as groups:
            for group in groups:
                seed_step(config.seed, ledger.epoch, ledger.step)
                session.take_step(group)
                self._after_step(sum(len(labels) for _, labels in group))
        if ledger.step != session.steps:
            got = f"{ledger.step} steps in epoch {ledger.epoch + 1}"
            raise CadaptError(f"the training data gave {got}, expected {session.steps}")

    def _after_step(self, images: int) -> None:
        session, ledger, config = self._session, self._session.ledger, self._session.config
        ledger.step += 1
        ledger.images += images
        ledger.train_seconds += self._pace.step_done(images)
        now = monotonic()
        if session.steps_done % config.log_every_steps == 0:
            self._log_interval()
        if ledger.step == session.steps or now - self._event_at >= SECONDS_BETWEEN_STEP_EVENTS:
            self._event_at = now
            self._emit(self._step_event())
        if self._stop.received is not None:
            self._save_and_stop()
        if now - session.saved_at >= config.save_every_seconds:
            self._save()
            self._pace.start()

    def _log_interval(self) -> None:
        session = self._session
        session.check_finite()
        means = session.interval_meter.read()
        session.interval_meter.reset()
        record = {
            "kind": "steps",
            "epoch": session.ledger.epoch + 1,
            "step": session.steps_done,
            "loss": means.loss,
            "top1": means.top1,
            "lr": session.lr,
            "images_per_second": round(self._pace.images_per_second(), 1),
        }
        session.recorder.write(record, session.steps_done)

    def _step_event(self) -> StepDone:
        session, ledger, config = self._session, self._session.ledger, self._session.config
        means = session.epoch_meter.read()
        total = config.epochs * session.steps
        return StepDone(
            epoch=ledger.epoch + 1,
            epochs=config.epochs,
            step=ledger.step,
            steps=session.steps,
            loss=means.loss,
            top1=means.top1,
            lr=session.lr,
            images_per_second=self._pace.images_per_second(),
            eta_seconds=self._pace.eta_seconds(total - session.steps_done, config.epochs - ledger.epoch),
        )

    def _validate(self) -> dict[str, float]:
        session = self._session
        session.check_finite()
        if session.data.validation is None:
            return {}
        self._pace.start()
        try:
            with session.stepper.averaged():
                found = validate(
                    session.model,
                    self._feed.of(session.data.validation()),
                    classes=session.data.classes,
                    precision=session.precision,
                    stop=self._stop,
                )
        except ValidationStoppedError:
            self._save_and_stop()
        self._pace.validation_done()
        return found

    def _close_epoch(self, validation: dict[str, float]) -> None:
        session, ledger = self._session, self._session.ledger
        means = session.epoch_meter.read()
        lr = session.lr
        is_best = ledger.close_epoch({"loss": means.loss, "top1": means.top1, **validation})
        session.epoch_meter.reset()
        session.count_seconds()
        event = EpochDone(
            epoch=ledger.epoch,
            epochs=session.config.epochs,
            loss=means.loss,
            top1=means.top1,
            lr=lr,
            images_per_second=self._pace.images_per_second(),
            seconds=ledger.seconds,
            is_best=is_best,
            validation=validation,
        )
        session.recorder.write(_epoch_record(event, session.steps_done), session.steps_done)
        if is_best:
            with session.stepper.averaged():
                session.best_tensors = session.learnt.capture()
                session.save_best()
        self._emit(event)
        self._save()
        if self._stop.received is not None and ledger.epoch < session.config.epochs:
            raise self._interrupted()

    def _finish(self) -> TrainResult:
        session, ledger, config = self._session, self._session.ledger, self._session.config
        with session.stepper.averaged():
            kept = session.best_tensors if config.keep == "best" else session.learnt.capture()
        session.learnt.restore(kept)
        session.model.eval()
        return TrainResult(
            epochs=ledger.epoch,
            steps=session.steps_done,
            best_epoch=ledger.best_epoch,
            best=ledger.best,
            final=ledger.final,
            seconds=ledger.seconds,
            images_per_second=ledger.images / ledger.train_seconds if ledger.train_seconds > 0 else 0.0,
            device=str(session.device),
            precision=session.precision,
            kept=config.keep,
            skipped_steps=session.stepper.skipped,
            loss_curve=thinned(tuple(ledger.losses)),
        )

    def _save(self) -> None:
        session = self._session
        session.save()
        if session.run is not None:
            ledger = session.ledger
            self._emit(Saved(path=str(session.run.path), epoch=ledger.epoch, step=ledger.step))

    def _save_after_failure(self) -> None:
        """Save; a termination sent to all of a run's processes ends its readers first, and is what stopped it."""
        self._save()
        sleep(SECONDS_FOR_SIGNALS)
        if self._stop.received is not None:
            raise self._interrupted()

    def _save_and_stop(self) -> NoReturn:
        self._save()
        raise self._interrupted()

    def _interrupted(self) -> InterruptedRunError:
        session, ledger, received = self._session, self._session.ledger, self._stop.received
        assert received is not None
        where = f"after epoch {ledger.epoch} of {session.config.epochs}"
        if ledger.step:
            where += f" and {ledger.step} of {session.steps} steps of the next"
        kept = "nothing was saved: there is no run folder" if session.run is None else f"saved in '{session.run.path}'"
        return InterruptedRunError(
            f"stopped by {received.name} {where}; {kept}",
            exit_code=128 + received,
            hint=None if session.run is None else f"cadapt train --resume {session.run.path}",
        )


def _ignore(_event: Event) -> None:
    pass


def _epoch_record(event: EpochDone, steps_done: int) -> dict[str, Any]:
    record = asdict(event)
    validation = record.pop("validation")
    del record["epochs"]
    return {"kind": "epoch", "step": steps_done, **record, **validation}


@contextmanager
def _memory_explained(config: TrainConfig) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        half = config.batch_size // 2
        hint = f"use --batch-size {half} --accumulate {2 * config.accumulate}: the same step from half the memory"
        if config.memory != "min":
            hint += "; or --memory min, for time"
        raise CadaptError(
            f"the device ran out of memory with {config.batch_size} images per batch",
            hint=hint if half else "use --memory min, --precision bf16 or smaller images",
        ) from error
