"""The work behind the commands that touch data: from an adapter file and a folder to a trained file or a figure.

Each function here is what a command calls once; it ties the layers below together and prints nothing.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cadapt.adapted import ADAPTERS, AdaptedModel
from cadapt.backbone import Backbone
from cadapt.bundle import Bundle, bundle_bytes, load_bundle, save_bundle
from cadapt.data import (
    DEFAULT_PRESET,
    PRESETS,
    ClassMatch,
    TrainingData,
    TrainLoader,
    evaluation_batches,
    match_classes,
    open_evaluation_data,
    open_training_data,
)
from cadapt.errors import CadaptError, RefusedError, UsageError, close_matches
from cadapt.evaluation import EvalResult, evaluate
from cadapt.files import write_atomically
from cadapt.library import base_of, from_bundle, to_bundle
from cadapt.planning import with_head
from cadapt.train import Event, FitData, RunFolder, TrainConfig, TrainResult, fit
from cadapt.train.folder import prepare
from cadapt.train.hardware import resolve_device, resolve_precision
from cadapt.train.recorder import versions

Progress = Callable[[int, int], None]
_MOST_WORKERS = 8
_HEAD = f"{ADAPTERS}.head."
_JOB, _START = "job.json", "start.safetensors"


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What a training run is on: the data, how it is split and augmented, and the head that is put on it."""

    data: str
    val: str | None = None
    val_split: float = 0.1
    shots: int | None = None
    augment: str = DEFAULT_PRESET
    skip_bad: bool = False
    head_norm: bool = False
    head_dropout: float = 0.2
    new_head: bool = False

    def __post_init__(self) -> None:
        if self.augment not in PRESETS:
            raise UsageError(f"unknown augmentation '{self.augment}'", hint=close_matches(self.augment, PRESETS))
        if not 0 <= self.head_dropout < 1:
            raise UsageError(f"head dropout is {self.head_dropout:g}, expected 0 up to 1", hint="--head-dropout 0.2")

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that :meth:`from_json` reads back to an equal value."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> TaskOptions:
        """Read the options back from a run's record; what is not known here is left out."""
        known = {item.name for item in fields(cls)}
        return cls(**{key: value for key, value in record.items() if key in known})


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished run: the adapter file's content, the engine's result, and what the data was."""

    bundle: Bundle
    result: TrainResult
    data: Mapping[str, Any]


def default_workers() -> int:
    """Reader processes when the user names no number: one less than the cores, so that training has one."""
    return min(_MOST_WORKERS, max(1, (os.cpu_count() or 1) - 1))


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """A training run as its folder keeps it: enough to begin it, and to go on with it after a kill.

    ``folder`` holds, besides what the engine writes, ``job.json`` and ``start.safetensors``, the adapter as it was.
    ``output`` is where the result goes. ``checkpoint`` and ``near`` say where to look for the base's weights.
    """

    options: TaskOptions
    config: TrainConfig
    folder: Path
    output: str
    overwrite: bool = False
    checkpoint: Path | None = None
    near: Path | None = None
    resume: bool = False

    @classmethod
    def begin(
        cls,
        adapter: Bundle | Path | bytes,
        options: TaskOptions,
        config: TrainConfig,
        *,
        folder: Path,
        force: bool,
        **rest: Any,
    ) -> TrainJob:
        """Lay out a run folder for a new run.

        Args:
            adapter: the adapter, its file, or that file's bytes.
            options: the task.
            config: the recipe.
            folder: the run folder.
            force: replace a run that is in it.
            **rest: the job's other fields.

        Raises:
            UsageError: the folder holds a run.
            RefusedError: the adapter is damaged.
        """
        job = cls(options=options, config=config, folder=folder, **rest)
        content = bundle_bytes(adapter if isinstance(adapter, Bundle) else load_bundle(adapter))
        prepare(RunFolder(path=folder, force=force))
        try:
            write_atomically(folder / _START, content, overwrite=True)
            job._write_record()
        except BaseException:
            job.discard_unbegun()
            raise
        return job

    def _write_record(self) -> None:
        record = {
            "version": 1,
            "options": self.options.to_json(),
            "config": self.config.to_json(),
            "output": self.output,
            "overwrite": self.overwrite,
            "checkpoint": _absolute(self.checkpoint),
            "near": _absolute(self.near),
        }
        write_atomically(self.folder / _JOB, (json.dumps(record, indent=2) + "\n").encode(), overwrite=True)

    @classmethod
    def read(cls, folder: Path) -> TrainJob:
        """Read a run folder's job, to go on with it.

        Raises:
            UsageError: there is no run in the folder.
            RefusedError: its record is damaged.
        """
        path = folder / _JOB
        if not path.is_file():
            raise UsageError(f"no run to resume in {folder}: {_JOB} is missing", hint="ls runs")
        try:
            record = json.loads(path.read_text())
            return cls(
                options=TaskOptions.from_json(record["options"]),
                config=TrainConfig.from_json(record["config"]),
                folder=folder,
                output=record["output"],
                overwrite=record["overwrite"],
                checkpoint=None if record["checkpoint"] is None else Path(record["checkpoint"]),
                near=None if record["near"] is None else Path(record["near"]),
                resume=True,
            )
        except (ValueError, KeyError, TypeError) as error:
            raise RefusedError(f"damaged run record {path}: {error}") from error

    def with_changes(
        self, config: Mapping[str, Any], *, checkpoint: Path | None, output: str | None, overwrite: bool | None
    ) -> TrainJob:
        """The same run with settings that change none of its numbers, or with other files; None leaves one as it is."""
        return replace(
            self,
            config=replace(self.config, **config),
            checkpoint=checkpoint or self.checkpoint,
            output=output or self.output,
            # leave was given for the run's own output alone
            overwrite=(self.overwrite if output is None else False) if overwrite is None else overwrite,
        )

    @property
    def saved(self) -> bool:
        """Whether the run got so far that it can go on from a saved state."""
        return RunFolder(path=self.folder).state.is_file()

    def discard_unbegun(self) -> bool:
        """Remove what :meth:`begin` wrote if no training came of it; whether it was so."""
        if self.resume or RunFolder(path=self.folder).record.exists():
            return False
        for name in (_JOB, _START):
            (self.folder / name).unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()
        return True

    def train(
        self,
        *,
        workers: int | None = None,
        on_event: Callable[[Event], None] | None = None,
        on_progress: Progress | None = None,
    ) -> Trained:
        """Run it, from the start or from where its folder stands; raises as :func:`train_bundle` does."""
        # without a saved state the run was killed before its first save: it begins again
        resume = self.resume and self.saved
        return train_bundle(
            load_bundle(self.folder / _START),
            self.options,
            self.config,
            run=RunFolder(path=self.folder, resume=resume, force=True, command=tuple(sys.argv)),
            checkpoint=self.checkpoint,
            near=self.near,
            workers=workers,
            on_event=on_event,
            on_progress=on_progress,
        )


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


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

    Args:
        bundle: the adapter, fresh from ``insert`` or trained before on the same classes.
        options: the task.
        config: the recipe.
        run: where metrics and weights are kept; None keeps nothing.
        checkpoint: the base's weights, if not where they last were.
        near: the adapter file's folder.
        workers: reader processes; None is :func:`default_workers`.
        on_event: called with the engine's events.
        on_progress: called while the pictures are checked.

    Raises:
        RefusedError: unreadable pictures, classes that differ, the wrong base.
        CadaptError: as :func:`cadapt.train.fit` says.
    """
    processes = default_workers() if workers is None else workers
    data = open_training_data(
        options.data,
        val=options.val,
        val_split=options.val_split,
        shots=options.shots,
        seed=config.seed,
        skip_bad=options.skip_bad,
        workers=max(1, processes),
        on_progress=on_progress,
    )
    backbone = base_of(bundle, checkpoint=checkpoint, near=near)
    model = _with_task_head(bundle, backbone, data.classes, options, config.seed)
    fit_data = _fit_data(data, model, options, config, processes)
    saver = partial(_save, classes=data.classes, data=data.record, options=options)
    result = fit(model, fit_data, config, run=run, on_event=on_event, save_weights=saver)
    model.training_record = _record(data.record, options, {"config": config.to_json(), **result.to_json()})
    return Trained(bundle=to_bundle(model), result=result, data=data.record)


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
    held = data.val
    return FitData(
        train=loader,
        classes=data.classes,
        validation=None
        if held is None
        else lambda: evaluation_batches(held, model.preprocessing, config.batch_size, workers),
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
    named = {**data, "name": Path(options.data).name}
    told = {key: value for key, value in options.to_json().items() if key not in ("data", "val", "new_head")}
    return {"data": named, "options": told, "versions": versions(), **engine}


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """An evaluation: its figures, how the data's classes match the model's, and what the data was."""

    result: EvalResult
    match: ClassMatch
    dropped: int
    data: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {
            "schema": 1,
            **self.result.to_json(),
            "missing_in_data": list(self.match.missing_in_data),
            "unknown_to_model": list(self.match.unknown_to_model),
            "dropped_images": self.dropped,
            "data": dict(self.data),
        }


def trained_model(bundle: Bundle, *, checkpoint: Path | None = None, near: Path | None = None) -> AdaptedModel:
    """Build a trained adapter's model.

    Raises:
        CadaptError: it was never trained, so its outputs mean nothing yet.
    """
    if not bundle.classes:
        raise CadaptError("the adapter was not trained: it has no classes yet", hint="cadapt train DATA")
    return from_bundle(bundle, base_of(bundle, checkpoint=checkpoint, near=near))


def evaluate_model(
    model: AdaptedModel,
    source: str,
    *,
    batch_size: int = 64,
    device: str = "auto",
    precision: str = "auto",
    workers: int | None = None,
    skip_bad: bool = False,
    on_progress: Progress | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Evaluated:
    """Evaluate a trained model on image files, matching classes by name.

    Pictures of classes the model does not know cannot be judged; they are left out and counted.

    Raises:
        RefusedError: none of the data's classes is the model's, or pictures are unreadable.
    """
    processes = default_workers() if workers is None else workers
    data = open_evaluation_data(source, skip_bad=skip_bad, workers=max(1, processes), on_progress=on_progress)
    match = match_classes(model.classes, data.classes)
    if not match.index_map:
        raise RefusedError(
            f"none of the data's classes ({', '.join(data.classes[:3])} …) is the model's "
            f"({', '.join(model.classes[:3])} …)",
            hint="name the folders as the model's classes, which cadapt inspect FILE lists",
        )
    images = data.images.relabel(match.index_map, model.classes)
    place = resolve_device(device)
    result = evaluate(
        model,
        evaluation_batches(images, model.preprocessing, batch_size, processes),
        classes=model.classes,
        device=place,
        precision=resolve_precision(precision, place),  # type: ignore[arg-type]
        on_batch=on_batch,
    )
    return Evaluated(result=result, match=match, dropped=len(data.images) - len(images), data=data.record)


def convert_bundle(bundle: Bundle, dtype: str) -> bytes:
    """The adapter file with its floating tensors in another dtype; buffers of counts stay whole numbers.

    Raises:
        UsageError: an unknown dtype.
    """
    kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if dtype not in kinds:
        raise UsageError(f"unknown dtype '{dtype}'", hint=close_matches(dtype, kinds))
    tensors = {
        name: tensor.to(kinds[dtype]) if tensor.is_floating_point() else tensor
        for name, tensor in bundle.tensors.items()
    }
    too_large = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if too_large:
        raise CadaptError(f"'{too_large[0]}' does not fit into {dtype}: it would overflow", hint="--dtype bf16")
    return bundle_bytes(replace(bundle, tensors=tensors))
