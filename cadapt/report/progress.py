"""Shows a training run as it goes, on stderr, from the engine's events.

On a terminal one live line follows the steps; elsewhere, in a log file or a pipe, plain lines come sparsely, so that a
run of a hundred epochs leaves a log that can be read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, TextIO

from cadapt.report.console import number_of, printable
from cadapt.train.events import EpochDone, Event, Notice, RunStarted, Saved, StepDone

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def show_training(
    *, quiet: bool = False, stream: TextIO | None = None, clock: Callable[[], float] = monotonic
) -> Iterator[Callable[[Event], None]]:
    """Yield a function to call with each event of ``cadapt.train.fit``.

    Args:
        quiet: show nothing at all.
        stream: where to write, stderr unless told.
        clock: seconds that only grow.

    >>> with show_training(quiet=True) as show:
    ...     show(Notice(message="not shown"))
    """
    target = sys.stderr if stream is None else stream
    if quiet:
        yield _show_nothing
    elif target.isatty():
        live = _Live(target)
        try:
            yield live.show
        finally:
            live.stop()
    else:
        yield _Sparse(target, clock).show


def _show_nothing(_event: Event) -> None:
    pass


def line_of(event: Event) -> str:
    """Return an event as one plain line.

    >>> line_of(Notice(message="warm-up cut from 10 to 2 of 20 epochs"))
    'note: warm-up cut from 10 to 2 of 20 epochs'
    """
    if isinstance(event, Notice):
        return f"note: {event.message}"
    if isinstance(event, RunStarted):
        return _started(event)
    if isinstance(event, StepDone):
        where = f"epoch {event.epoch}/{event.epochs} step {event.step}/{event.steps}"
        return f"{where}  {_numbers(event)}  {duration(event.eta_seconds)} left"
    if isinstance(event, EpochDone):
        best = "  best" if event.is_best else ""
        return f"epoch {event.epoch}/{event.epochs}  {_numbers(event)}{_validation(event.validation)}{best}"
    return f"saved in {event.path}"


def duration(seconds: float) -> str:
    """Return seconds as people say them.

    >>> duration(3.2), duration(75), duration(3725)
    ('3s', '1m15s', '1h02m')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _started(event: RunStarted) -> str:
    line = (
        f"training {event.trainable_parameters:,} parameters on {event.device} in {event.precision}: "
        f"{number_of(event.epochs, 'epoch')} of {number_of(event.steps_per_epoch, 'step')}"
    )
    if event.epochs_done or event.steps_done:
        line += f", going on after epoch {event.epochs_done} and {event.steps_done} steps"
    return line


def _numbers(event: StepDone | EpochDone) -> str:
    return f"loss {event.loss:.4f}  top1 {event.top1:.1%}  {event.images_per_second:.0f} images/s"


def _validation(metrics: Mapping[str, float]) -> str:
    if not metrics:
        return ""
    return f"  val loss {metrics['val_loss']:.4f}  val top1 {metrics['val_top1']:.1%}"


class _Sparse:
    """Plain lines: each epoch, and a step when nothing was written for a while."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        self._stream = stream
        self._clock = clock
        self._wrote_at = float("-inf")

    def show(self, event: Event) -> None:
        if isinstance(event, Saved):
            return
        if isinstance(event, StepDone) and self._clock() - self._wrote_at < SECONDS_BETWEEN_LINES:
            return
        if isinstance(event, StepDone | EpochDone):
            self._wrote_at = self._clock()
        print(printable(line_of(event)), file=self._stream, flush=True)


class _Live:
    """One line that is redrawn, with the finished epochs above it."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._console: Console = Console(file=stream, highlight=False, soft_wrap=True)
        self._bar: Progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=self._console,
            transient=True,
        )
        self._task: TaskID = self._bar.add_task("starting", numbers="", total=None)
        self._bar.start()

    def show(self, event: Event) -> None:
        if isinstance(event, Saved):
            return
        if not isinstance(event, StepDone):
            self._console.print(printable(line_of(event)), markup=False)
            return
        self._bar.update(
            self._task,
            description=f"epoch {event.epoch}/{event.epochs}",
            completed=event.step,
            total=event.steps,
            numbers=f"{_numbers(event)}  {duration(event.eta_seconds)} left",
        )

    def stop(self) -> None:
        self._bar.stop()
