"""Training an adapter on image files: data, base and head brought together for the engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from cadapt.adapted import ADAPTERS, AdaptedModel
from cadapt.backbone import Backbone
from cadapt.bundle import Bundle, save_bundle
from cadapt.costing.advice import memory_notices
from cadapt.costing.run_memory import StepSetting
from cadapt.data import (
    TrainingData,
    TrainLoader,
    UnreadableImage,
    UnreadableImages,
    evaluation_batches,
    open_training_data,
)
from cadapt.data.beside import CheckBeside
from cadapt.errors import RefusedError
from cadapt.frozen import prepare
from cadapt.jobs.task import Progress, TaskOptions, Trained, default_workers
from cadapt.library import base_of, from_bundle, to_bundle
from cadapt.planning import with_head
from cadapt.train import Event, FitData, Notice, RunFolder, TrainConfig, fit
from cadapt.train.protocols import PrepareForward
from cadapt.train.recorder import versions

if TYPE_CHECKING:
    from cadapt.train.protocols import Batch

_HEAD = f"{ADAPTERS}.head."


def train_bundle(
    bundle: Bundle,
    options: TaskOptions,
    config: TrainConfig,
    *,
    run: RunFolder | None,
    checkpoint: Path | None = None,
    near: Path | None = None,
    workers: int | None = None,
    on_event: Callable[[Event], None] | None = None,
    on_progress: Progress | None = None,
) -> Trained:
    """Train an adapter on image files.

    Every picture of the source is decoded once: those of a small one, or with ``skip_bad``, before the run; else beside
    it, and what cannot be read stops it with its state saved.

    Args:
        bundle: the adapter, fresh from ``insert`` or trained before on the same classes.
        options: the task.
        config: the recipe.
        run: where metrics and weights are kept; None keeps nothing.
        checkpoint: the base's weights, if not where they last were.
        near: the adapter file's folder.
        workers: reader processes; None is :func:`default_workers`, and 0 starts none, so that the pictures are checked
            before the run.
        on_event: called with the engine's events.
        on_progress: called while the pictures are checked.

    Raises:
        RefusedError: unreadable pictures, classes that differ, the wrong base.
        CadaptError: as :func:`cadapt.train.fit` says.
    """
    processes = default_workers() if workers is None else workers
    data = _open(options, config.seed, workers, on_progress)
    tell = on_event or _ignore
    for message in (data.note, _counted(data)):
        if message is not None:
            tell(Notice(message=message))
    with nullcontext() if data.check is None else closing(data.check):
        backbone = base_of(bundle, checkpoint=checkpoint, near=near)
        model = _with_task_head(bundle, backbone, data.classes, options, config.seed)
        fit_data = _fit_data(data, model, options, config, processes)
        saver = partial(_save, classes=data.classes, data=data.record, options=options)
        with _all_checked(data.check, tell):
            result = fit(
                model,
                fit_data,
                config,
                run=run,
                on_event=on_event,
                save_weights=saver,
                prepare_forward=_forward_of(config, len(data.train), tell),
            )
    model.training_record = _record(data.record, options, {"config": config.to_json(), **result.to_json()})
    trained = sum(item.numel() for item in model.parameters() if item.requires_grad)
    return Trained(bundle=to_bundle(model), result=result, trainable_parameters=trained, data=data.record)


def _forward_of(config: TrainConfig, pictures: int, tell: Callable[[Event], None]) -> PrepareForward:
    """What trains in the model's place: the same computation, keeping less; its memory is told before it is taken."""

    def prepare_forward(model: nn.Module, precision: str, /) -> nn.Module:
        assert isinstance(model, AdaptedModel), type(model)
        run: nn.Module = model
        if config.memory != "plain":
            run = prepare(model, memory=config.memory, precision=precision, channels_last=config.channels_last)
        channels, height, width = model.preprocessing.input_size
        setting = StepSetting(
            input_size=(channels, height, width),
            batch_size=min(config.batch_size, pictures),
            accumulate=config.accumulate,
            device=str(next(model.parameters()).device),
            precision=precision,
            channels_last=config.channels_last,
            average=config.ema is not None,
        )
        for message in memory_notices(run, setting, beside=() if run is model else (model,)):
            tell(Notice(message=message))
        return run

    return prepare_forward


def _open(options: TaskOptions, seed: int, workers: int | None, on_progress: Progress | None) -> TrainingData:
    processes = default_workers() if workers is None else workers
    # before the run, every core is free
    threads = os.cpu_count() or 1 if workers is None and options.skip_bad else max(1, processes)
    return open_training_data(
        options.data,
        val=options.val,
        val_split=options.val_split,
        shots=options.shots,
        seed=seed,
        skip_bad=options.skip_bad,
        workers=threads,
        on_progress=on_progress,
        beside=processes > 0,
    )


@contextmanager
def _all_checked(check: CheckBeside | None, tell: Callable[[Event], None]) -> Iterator[None]:
    """See to it that a run ends well only on data that was checked to the end, and that all bad pictures are named."""
    if check is None:
        yield
        return
    begun = False
    try:
        check.look()
        begun = True
        yield
        check.look()
        if not check.finished:
            tell(Notice(message="trained; the check of the pictures has yet to end"))
        check.finish()
    except (UnreadableImage, UnreadableImages):
        if not check.finished:
            tell(Notice(message="unreadable pictures: checking the rest, so that all of them are named"))
        try:
            check.finish()
        except UnreadableImages as error:
            if begun:  # on other pictures it would be another run
                error.hint = "leave them out in a new run with --skip-bad, or replace them"
            raise
        raise  # found by a reader alone: the file has changed since it was checked


def _counted(data: TrainingData) -> str:
    held = "none held out" if data.val is None else f"{len(data.val)} to validate on"
    return f"{len(data.train)} pictures of {len(data.classes)} classes to train on, {held}"


def _with_task_head(
    bundle: Bundle, backbone: Backbone, classes: Sequence[str], options: TaskOptions, seed: int
) -> AdaptedModel:
    trained = bundle.plan.head is not None
    if trained and bundle.classes == tuple(classes) and not options.new_head:
        return from_bundle(bundle, backbone)
    if trained and not options.new_head:
        lacking = [name for name in bundle.classes if name not in classes]
        extra = [name for name in classes if name not in bundle.classes]
        differing = f"lacks {lacking[0]!r}" if lacking else f"has {extra[0]!r}" if extra else "orders them differently"
        raise RefusedError(
            f"the adapter was trained on {len(bundle.classes)} other classes: the data {differing}",
            hint="--new-head keeps the adapters and starts a new head",
        )
    plan = with_head(
        bundle.plan, backbone, len(classes), norm=options.head_norm, dropout=options.head_dropout, seed=seed
    )
    adapters = {name: tensor for name, tensor in bundle.tensors.items() if not name.startswith(_HEAD)}
    model = from_bundle(replace(bundle, plan=plan, tensors=adapters), backbone, fresh=_HEAD)
    model.classes = tuple(classes)
    return model


@dataclass(frozen=True, kw_only=True)
class _Watched:
    """The batches of a loader while the check of its pictures goes on."""

    loader: TrainLoader
    check: CheckBeside

    @property
    def steps_per_epoch(self) -> int:
        return self.loader.steps_per_epoch

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        return self.check.watched(self.loader.batches(epoch, start_step))


def _fit_data(
    data: TrainingData, model: AdaptedModel, options: TaskOptions, config: TrainConfig, workers: int
) -> FitData:
    loader = TrainLoader(
        data.train,
        model.preprocessing,
        options.augment,
        batch_size=config.batch_size,
        seed=config.seed,
        workers=workers,
    )
    held, check = data.val, data.check

    def validation() -> Iterator[Batch]:
        assert held is not None
        batches = evaluation_batches(held, model.preprocessing, config.batch_size, workers)
        return batches if check is None else check.watched(batches)

    return FitData(
        train=loader if check is None else _Watched(loader=loader, check=check),
        classes=data.classes,
        validation=None if held is None else validation,
        record={**data.record, "augment": options.augment},
    )


def _save(
    path: Path,
    model: nn.Module,
    record: dict[str, Any],
    *,
    classes: Sequence[str],
    data: Mapping[str, Any],
    options: TaskOptions,
) -> None:
    assert isinstance(model, AdaptedModel), type(model)
    training = _record(data, options, record)
    save_bundle(path, replace(to_bundle(model), classes=tuple(classes), training=training), overwrite=True)


def _record(data: Mapping[str, Any], options: TaskOptions, engine: Mapping[str, Any]) -> dict[str, Any]:
    """The training record: what, how, and what came of it; paths of this machine left out."""
    told = {key: value for key, value in options.to_json().items() if key not in ("data", "val", "new_head")}
    return {"data": dict(data), "options": told, "versions": versions(), **engine}


def _ignore(_event: Event) -> None:
    pass
