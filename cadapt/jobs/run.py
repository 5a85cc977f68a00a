"""A training run as its folder keeps it, begun once and resumed as often as need be."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cadapt.bundle import Bundle, bundle_bytes, load_bundle
from cadapt.data.readers import absolute_source
from cadapt.errors import RefusedError, UsageError
from cadapt.files import write_atomically
from cadapt.jobs.task import Progress, TaskOptions, Trained
from cadapt.jobs.training import train_bundle
from cadapt.train import Event, RunFolder, TrainConfig
from cadapt.train.folder import prepare

_JOB, _START = "job.json", "start.safetensors"


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """A training run as its folder keeps it: enough to begin it, and to go on with it after a kill.

    ``folder`` holds, besides what the engine writes, ``job.json`` and ``start.safetensors``, the adapter as it was.
    ``output`` is where the result goes. ``checkpoint`` and ``near`` say where to look for the base's weights. All paths
    in ``job.json`` are absolute, so that the run goes on from any folder. ``start`` is the adapter as it was, if this
    process has read it. Whoever begins or resumes a job holds its folder: :func:`cadapt.jobs.hold_folder`.
    """

    options: TaskOptions
    config: TrainConfig
    folder: Path
    output: str
    overwrite: bool = False
    checkpoint: Path | None = None
    near: Path | None = None
    resume: bool = False
    start: bytes | None = field(default=None, repr=False)

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
        content = bundle_bytes(adapter if isinstance(adapter, Bundle) else load_bundle(adapter))
        job = cls(options=options, config=config, folder=folder, start=content, **rest)
        if not force:
            _refuse_begun(folder)
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
            "options": {**self.options.to_json(), **self._sources()},
            "config": self.config.to_json(),
            "output": self.output if self.output == "-" else str(Path(self.output).absolute()),
            "overwrite": self.overwrite,
            "checkpoint": _absolute(self.checkpoint),
            "near": _absolute(self.near),
        }
        write_atomically(self.folder / _JOB, (json.dumps(record, indent=2) + "\n").encode(), overwrite=True)

    def _sources(self) -> dict[str, str | None]:
        given = {"data": self.options.data, "val": self.options.val}
        return {name: None if source is None else absolute_source(source) for name, source in given.items()}

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
                output=_as_seen_from_here(record["output"]),
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
        """The same run with settings that change nothing but rounding, or with other files; None keeps one as it is."""
        return replace(
            self,
            config=replace(self.config, **config),
            checkpoint=checkpoint or self.checkpoint,
            output=output or self.output,
            # leave was given for the run's own output alone
            overwrite=(self.overwrite and self._writes_to(output)) if overwrite is None else overwrite,
        )

    def _writes_to(self, output: str | None) -> bool:
        return output in (None, self.output) or ("-" not in (output, self.output) and _same(str(output), self.output))

    def is_on(self, name: str, source: str) -> bool:
        """Whether a source, as named from the current folder, is the run's ``data`` or ``val``."""
        own = getattr(self.options, name)
        return own is not None and _same(absolute_source(source), absolute_source(own))

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
            load_bundle(self.start if self.start is not None else self.folder / _START),
            self.options,
            self.config,
            run=RunFolder(path=self.folder, resume=resume, force=True, command=tuple(sys.argv)),
            checkpoint=self.checkpoint,
            near=self.near,
            workers=workers,
            on_event=on_event,
            on_progress=on_progress,
        )


def _refuse_begun(folder: Path) -> None:
    """Refuse a run that was killed before the engine wrote anything: it is one all the same, and can be resumed."""
    begun = next((name for name in (_JOB, _START) if (folder / name).exists()), None)
    if begun is not None:
        raise UsageError(
            f"'{folder}' holds a run already ({begun})",
            hint="go on with it by --resume, begin anew over it by --force, or name another folder",
        )


def _as_seen_from_here(output: str) -> str:
    """An output's shortest path: relative to the current folder where it lies beneath."""
    path = Path(output)
    beneath = path.is_absolute() and path.is_relative_to(Path.cwd())
    return str(path.relative_to(Path.cwd())) if beneath else output


def _same(one: str, other: str) -> bool:
    # links count: the working folder itself may be reached by one
    return os.path.realpath(one) == os.path.realpath(other)


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())
