"""``cadapt eval``: how good a trained adapter is on image files."""

from __future__ import annotations

from typing import Annotated

import typer

from cadapt.cli._options import Adapter, AsJson, Checkpoint, Device, Precision, Quiet, SkipBad, Workers
from cadapt.cli._streams import find_adapter, load_adapter, print_json
from cadapt.errors import ThresholdMissedError
from cadapt.thresholds import check_thresholds, parse_thresholds

EXAMPLE = "cadapt eval ./imgs/test --fail-under top1=0.9"


def command(
    data: Annotated[str, typer.Argument(help="A folder of class folders, or with test/ or val/ in it, or a reader.")],
    model: Adapter = None,
    fail_under: Annotated[
        list[str] | None,
        typer.Option("--fail-under", metavar="METRIC=VALUE", help="Exit 3 if missed: top1=0.9, ece=0.05 (at most) …"),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Pictures at a time.")] = 64,
    checkpoint: Checkpoint = None,
    device: Device = None,
    precision: Precision = None,
    workers: Workers = None,
    skip_bad: SkipBad = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Evaluate a trained adapter: top-1, top-5, mean per class, calibration error, confusion.

    Classes are matched by name; those missing on either side are named.
    """
    thresholds = parse_thresholds(fail_under or ())
    source = find_adapter(model)
    from cadapt.jobs import evaluate_model, trained_model
    from cadapt.report.evaluate import show_evaluated
    from cadapt.report.train import show_checking

    adapted = trained_model(load_adapter(source), checkpoint=checkpoint, near=source.folder)
    with show_checking(quiet=quiet) as on_progress:
        found = evaluate_model(
            adapted,
            data,
            batch_size=batch_size,
            device=device or "auto",
            precision=precision or "auto",
            workers=workers,
            skip_bad=skip_bad,
            on_progress=on_progress,
        )
    if not quiet:
        show_evaluated(found)
    if as_json:
        print_json(found.to_json())
    missed = check_thresholds(found.result, thresholds)
    if missed:
        raise ThresholdMissedError("; ".join(missed))
