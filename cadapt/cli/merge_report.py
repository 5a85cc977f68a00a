"""``cadapt merge-report``: which adapters fold into the base, at what error, and what stays and why."""

from __future__ import annotations

from typing import Annotated

import typer

from cadapt.cli._options import Adapter, AsJson, Checkpoint, Device, Quiet, Workers
from cadapt.cli._streams import find_adapter, load_adapter, print_json

EXAMPLE = "cadapt merge-report --data ./imgs/val"


def command(
    model: Adapter = None,
    data: Annotated[str | None, typer.Option("--data", help="Pictures to compare adapted and merged model on.")] = None,
    checkpoint: Checkpoint = None,
    device: Device = None,
    workers: Workers = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Report what folds into the base, per site, checked in fp64 and fp32; nothing is changed."""
    source = find_adapter(model)
    from cadapt.jobs import evaluate_model, trained_model
    from cadapt.library import base_of, from_bundle
    from cadapt.merging import merge
    from cadapt.report.console import percent, stderr_console
    from cadapt.report.merge import show_merge

    bundle = load_adapter(source)
    if data is None:
        adapted = from_bundle(bundle, base_of(bundle, checkpoint=checkpoint, near=source.folder))
    else:  # only a trained adapter has classes to compare on
        adapted = trained_model(bundle, checkpoint=checkpoint, near=source.folder)
    merged, report = merge(adapted)
    record = report.to_json()
    if not quiet:
        show_merge(report, stderr_console())
    if data is not None:
        before, after = (
            evaluate_model(item, data, device=device or "auto", precision="fp32", workers=workers).result
            for item in (adapted, merged)
        )
        record["data"] = {"images": before.images, "top1_before": before.top1, "top1_after": after.top1}
        if not quiet:
            stderr_console().print(
                f"on {before.images} pictures: top-1 {percent(before.top1)} adapted, {percent(after.top1)} merged"
            )
    if as_json:
        print_json(record)
