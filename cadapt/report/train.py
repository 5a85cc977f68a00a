"""What ``cadapt train`` shows beside its live display: the check of the pictures before, the result after."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from cadapt.report.console import amount, count, literal, number_of, percent, stderr_console

if TYPE_CHECKING:
    from cadapt.jobs import Trained


@contextmanager
def show_checking(*, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Show how many pictures are decoded while they are checked; nothing where stderr is no terminal.

    Yields a function that is called with the pictures done and in all.
    """
    console = stderr_console()
    columns = (TextColumn("checking pictures"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("", total=None)

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, visible=done < total)

        yield advance


def show_trained(trained: Trained, output: str, size: int, folder: Path) -> None:
    """Show the figures of a finished run, and where its results are."""
    result, console = trained.result, stderr_console()
    best = {**result.best}
    top1 = best.get("val_top1", best.get("top1"))
    figure = "" if top1 is None else f", {'validation' if 'val_top1' in best else 'training'} top-1 {percent(top1)}"
    console.print(
        f"[bold]trained {number_of(result.epochs, 'epoch')}[/] in {result.seconds:.0f} s on {result.device} "
        f"({result.precision}, {result.images_per_second:.0f} pictures/s); best epoch {result.best_epoch}{figure}"
    )
    skipped = trained.data.get("skipped") or []
    if skipped:
        console.print(f"{count(len(skipped))} unreadable pictures left out", style="yellow")
    where = "stdout" if output == "-" else output
    console.print(f"wrote {literal(where)} ({amount(size)}); the run is in {literal(str(folder))}")
