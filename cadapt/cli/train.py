"""``cadapt train``: train an adapter on image files, in place, resumable, with its run on record."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cadapt.cli._errors import explain
from cadapt.cli._imports import collector_paused
from cadapt.cli._options import Adapter, AsJson, Checkpoint, Device, Force, Output, Precision, Quiet, SkipBad, Workers
from cadapt.cli._streams import (
    DEFAULT_ADAPTER,
    check_output,
    deliver,
    find_adapter,
    load_adapter,
    print_json,
    print_path,
)
from cadapt.errors import InterruptedRunError, UsageError

if TYPE_CHECKING:
    from cadapt.jobs import TrainJob

EXAMPLE = "cadapt train ./imgs --epochs 30 --augment light; cadapt train --resume runs/adapter-20261121-101500"
_TASK = ("val", "val_split", "shots", "augment", "skip_bad", "head_norm", "head_dropout", "new_head")
# the engine's name of each setting that is an option here
_SAME_NAME = (
    *("epochs", "batch_size", "lr", "weight_decay", "warmup_epochs", "label_smoothing", "mixup", "cutmix", "ema"),
    *("accumulate", "clip_grad", "keep", "seed", "device", "precision", "memory"),
)
_RECIPE = {**{name: name for name in _SAME_NAME}, "compiled": "compile", "save_every": "save_every_seconds"}


def command(
    context: typer.Context,
    data: Annotated[
        str | None,
        typer.Argument(help="A folder of class folders, or with train/ and val/ in it; or wds/, hfds/, torch/ NAME."),
    ] = None,
    model: Adapter = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over the pictures [100].")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Pictures a step [64].")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Highest learning rate of AdamW [0.001].")] = None,
    weight_decay: Annotated[float | None, typer.Option("--weight-decay", help="AdamW's [0.0001].")] = None,
    warmup_epochs: Annotated[int | None, typer.Option("--warmup-epochs", help="Linear warm-up [10].")] = None,
    val: Annotated[str | None, typer.Option("--val", help="Choose the best epoch on this source.")] = None,
    val_split: Annotated[
        float | None, typer.Option("--val-split", help="Share held out, by class, if there is no val/ [0.1].")
    ] = None,
    shots: Annotated[int | None, typer.Option("--shots", help="Train on so many pictures a class.")] = None,
    augment: Annotated[
        str | None, typer.Option("--augment", help="none, light, structured, standard or strong [light].")
    ] = None,
    label_smoothing: Annotated[float | None, typer.Option("--label-smoothing", help="From 0 to 1 [0].")] = None,
    mixup: Annotated[float | None, typer.Option("--mixup", help="Alpha of mixup [0].")] = None,
    cutmix: Annotated[float | None, typer.Option("--cutmix", help="Alpha of cutmix [0].")] = None,
    ema: Annotated[float | None, typer.Option("--ema", help="Decay of a moving average of what trains.")] = None,
    head_norm: Annotated[bool | None, typer.Option("--head-norm", help="A fresh norm before the head.")] = None,
    head_dropout: Annotated[float | None, typer.Option("--head-dropout", help="Before the head [0.2].")] = None,
    new_head: Annotated[bool | None, typer.Option("--new-head", help="Start the head anew, for other classes.")] = None,
    accumulate: Annotated[int | None, typer.Option("--accumulate", help="Batches a step [1].")] = None,
    clip_grad: Annotated[float | None, typer.Option("--clip-grad", help="Largest gradient norm.")] = None,
    keep: Annotated[str | None, typer.Option("--keep", help="best or last weights [best].")] = None,
    compiled: Annotated[bool | None, typer.Option("--compile", help="Run through torch.compile.")] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", help="Kept for backward: plain, fast, low or min; least last [low].")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the whole run [0].")] = None,
    save_every: Annotated[float | None, typer.Option("--save-every", help="Seconds between saves [60].")] = None,
    run_folder: Annotated[
        Path | None, typer.Option("--run", metavar="DIR", help="Where metrics and weights go [runs/NAME-TIME].")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="DIR", help="Go on with the run in this folder.")
    ] = None,
    checkpoint: Checkpoint = None,
    device: Device = None,
    precision: Precision = None,
    workers: Workers = None,
    skip_bad: SkipBad = False,
    output: Output = None,
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train an adapter on image files and write it in place.

    Interrupted, it saves first; --resume goes on, to the same result bit for bit on a CPU.
    """
    # by identity: 0 is a value, and equal to False
    given = {name: value for name, value in context.params.items() if value is not None and value is not False}
    asked = {name: given[name] for name in _TASK if name in given}
    recipe = {field: given[name] for name, field in _RECIPE.items() if name in given}
    if resume is not None:
        if model is not None or run_folder is not None:
            raise UsageError("--resume goes on with a run's own adapter and folder", hint="leave out -m and --run")
        beginning = _resumed_job(
            resume, data, asked, recipe, output, force=force, as_json=as_json, checkpoint=checkpoint
        )
    else:
        beginning = _new_job(
            data,
            model,
            asked,
            recipe,
            output,
            force=force,
            as_json=as_json,
            checkpoint=checkpoint,
            run_folder=run_folder,
        )
    with beginning as job:
        _run(job, workers, as_json=as_json, quiet=quiet)


@contextmanager
def _resumed_job(
    folder: Path,
    data: str | None,
    asked: Mapping[str, Any],
    recipe: Mapping[str, Any],
    output: str | None,
    *,
    force: bool,
    as_json: bool,
    checkpoint: Path | None,
) -> Iterator[TrainJob]:
    """The run in a folder, which is held meanwhile."""
    with collector_paused():
        from cadapt.jobs import TrainJob, hold_folder

    job = TrainJob.read(folder)
    free = _refuse_changes(job, data, asked, recipe)
    job = job.with_changes(free, checkpoint=checkpoint, output=output, overwrite=force or None)
    check_output(job.output, force=job.overwrite, as_json=as_json)
    with hold_folder(folder):
        yield job


@contextmanager
def _new_job(
    data: str | None,
    model: str | None,
    asked: Mapping[str, Any],
    recipe: Mapping[str, Any],
    output: str | None,
    *,
    force: bool,
    as_json: bool,
    checkpoint: Path | None,
    run_folder: Path | None,
) -> Iterator[TrainJob]:
    """A run that begins, its folder made and held meanwhile."""
    with collector_paused():
        from cadapt.jobs import TaskOptions, TrainJob, hold_folder, new_folder
    from cadapt.train import TrainConfig

    if data is None:
        raise UsageError("train needs DATA, a folder of pictures", hint="cadapt train ./imgs")
    options, config = TaskOptions(data=data, **asked), TrainConfig(**recipe)
    source = find_adapter(model)
    target = output or str(source.path or DEFAULT_ADAPTER)
    own = source.path if output is None else None
    check_output(target, force=force, as_json=as_json, but=own)
    adapter = load_adapter(source)
    folder = run_folder or new_folder(Path("runs") / f"{source.stem}-{time.strftime('%Y%m%d-%H%M%S')}")
    with hold_folder(folder):
        yield TrainJob.begin(
            adapter,
            options,
            config,
            folder=folder,
            output=target,
            overwrite=force or own is not None,
            checkpoint=checkpoint,
            near=source.folder,
            force=force,
        )


def _refuse_changes(
    job: TrainJob, data: str | None, asked: Mapping[str, Any], recipe: Mapping[str, Any]
) -> dict[str, Any]:
    """A resumed run is the run that was begun: what would change its numbers is refused, the rest returned."""
    from cadapt.train.config import FREE_AT_RESUME

    begun = {**job.options.to_json(), **job.config.to_json()}
    sources = ("data", "val")
    wanted = {**asked, **recipe, **({} if data is None else {"data": data})}
    for name, value in wanted.items():
        same = job.is_on(name, value) if name in sources else begun[name] == value
        if name not in FREE_AT_RESUME and not same:
            label = "data" if name == "data" else f"--{name.replace('_', '-')}"
            raise UsageError(
                f"the run began with {label} {begun[name]!r}, not {value!r}",
                hint="leave it out, or begin a new run without --resume",
            )
    return {name: value for name, value in wanted.items() if name in FREE_AT_RESUME}


def _run(job: TrainJob, workers: int | None, *, as_json: bool, quiet: bool) -> None:
    from cadapt.bundle import bundle_bytes
    from cadapt.report.progress import show_training
    from cadapt.report.train import show_checking, show_trained

    with _resumable(job):
        with show_checking(quiet=quiet) as on_progress, show_training(quiet=quiet) as on_event:
            trained = job.train(workers=workers, on_event=on_event, on_progress=on_progress)
        content = bundle_bytes(trained.bundle)
        deliver(content, job.output, overwrite=job.overwrite)
    if not quiet:
        show_trained(trained, job.output, len(content), job.folder)
    if as_json:
        record = {"schema": 1, "output": job.output, "bytes": len(content), "run": str(job.folder)}
        record |= {"trainable_parameters": trained.trainable_parameters, "classes": list(trained.bundle.classes)}
        print_json({**record, **trained.result.to_json(), "data": trained.data})
    print_path(job.output, as_json=as_json)


@contextmanager
def _resumable(job: TrainJob) -> Iterator[None]:
    """Leave no run folder of a run that never began, and say of any other how to go on with it."""
    try:
        yield
    except BaseException as error:
        if job.discard_unbegun() or not job.saved:
            raise
        known = explain(error)
        if known is None:
            raise
        command = f"cadapt train --resume {shlex.quote(str(job.folder))}"
        if not isinstance(known, InterruptedRunError):
            command = "; then ".join(filter(None, (known.hint, command)))
        known.hint = command
        raise known from error
