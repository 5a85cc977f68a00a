"""A bar on the terminal for work that is a number of like things: models surveyed, schemes compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from cadapt.report.console import stderr_console


@contextmanager
def show_counting(what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Show how many of some things are done; nothing where stderr is no terminal.

    Args:
        what: what is being done, in words.
        quiet: show nothing at all.

    Yields:
        a function that is called with how many are done and in all.
    """
    console = stderr_console()
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("", total=None)

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield advance
