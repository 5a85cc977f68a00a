"""``cadapt merge-report``: which adapters fold into the base, at what error, what stays and why; the merged file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cadapt.cli._combine import combine_files, single_file
from cadapt.cli._options import (
    Adapter,
    AsJson,
    Checkpoint,
    Device,
    Force,
    Output,
    Quiet,
    SkipBad,
    Workers,
)
from cadapt.cli._streams import (
    AdapterSource,
    check_output,
    deliver,
    find_adapter,
    load_adapter,
    print_json,
    print_path,
)
from cadapt.errors import ThresholdMissedError, UsageError
from cadapt.tolerance import parse_tolerance

if TYPE_CHECKING:
    from cadapt.jobs import Merged, MergeOptions

EXAMPLE = "cadapt merge-report --data ./imgs/val --tolerance top1=0.5% --html report.html --apply -o merged.safetensors"


def command(
    context: typer.Context,
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE", help="Adapter files; several of one base: can they be combined?"),
    ] = None,
    model: Adapter = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="Pictures to compare the models on; of several adapters, one for each."),
    ] = None,
    fit: Annotated[
        bool, typer.Option("--fit/--no-fit", help="With --data: fold what is not linear by kernels fitted on pictures.")
    ] = True,
    fit_data: Annotated[
        str | None,
        typer.Option("--fit-data", metavar="DIR", help="Pictures to fit on, classes do not matter [half of --data]."),
    ] = None,
    fit_images: Annotated[int, typer.Option("--fit-images", min=1, help="The most pictures to fit on.")] = 512,
    tolerance: Annotated[
        str | None,
        typer.Option("--tolerance", help="The most lost on --data, else exit 3: top1=0.5%, disagreement=1%, logit=0.1"),
    ] = None,
    finetune_epochs: Annotated[
        int,
        typer.Option("--finetune-epochs", min=0, help="Then train to the unmerged model's logits, without labels."),
    ] = 0,
    dense: Annotated[
        bool, typer.Option("--dense", help="Fold even where that costs more than layer and adapter.")
    ] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="Of the merged model and its file: fp32, bf16, fp16.")] = "fp32",
    latency: Annotated[
        bool | None,
        typer.Option("--latency/--no-latency", help="Time the models in onnxruntime, a minute or two [with --data]."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the report as one self-contained page.")
    ] = None,
    apply: Annotated[
        bool, typer.Option("--apply", help="Write an adapter file: what stays, and merged differences to the base.")
    ] = False,
    timm: Annotated[
        bool, typer.Option("--timm", help="With --apply: a full checkpoint that timm loads, where all folds in.")
    ] = False,
    method: Annotated[
        str | None, typer.Option("--method", help="average, linear, ties or dare [best worst task over all classes].")
    ] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="W,W", help="Of several adapters: a factor for each [1,1].")
    ] = None,
    density: Annotated[
        float | None, typer.Option("--density", help="Share of each adapter's changes that ties and dare keep [0.2].")
    ] = None,
    scale: Annotated[float | None, typer.Option("--scale", help="λ, the factor of what ties merges [1].")] = None,
    output: Output = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Of what is chosen to fit on, and of what dare drops.")
    ] = 0,
    checkpoint: Checkpoint = None,
    device: Device = None,
    workers: Workers = None,
    skip_bad: SkipBad = False,
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Report what folds into the base, per site, checked in fp64; with --apply, write the merged file.

    Of several adapters: how far they conflict, and what their combinations are worth on each one's pictures. With
    --data, the method is chosen by its worst task's top-1 over all classes, then by the mean with the task known;
    without, it is ties. The adapter files that were read are never changed.
    """
    if len(files or ()) > 1:
        combine_files(context)
        return
    allowed = None if tolerance is None else parse_tolerance(tolerance)
    _check_combination(apply=apply, timm=timm, output=output)
    source = find_adapter(single_file(context))
    target = _target(source, output, timm=timm) if apply else None
    _check_outputs(source, target, html, force=force, as_json=as_json)
    from cadapt.jobs import MergeOptions

    options = MergeOptions(
        data=data[0] if data else None,
        fit=fit,
        fit_data=fit_data,
        fit_images=fit_images,
        tolerance=allowed,
        finetune_epochs=finetune_epochs,
        dense=dense,
        dtype=dtype,
        apply=None if not apply else "timm" if timm else "adapter",
        latency=latency,
        seed=seed,
        device=device or "auto",
        workers=workers,
        skip_bad=skip_bad,
    )
    merged = _merge(source, options, checkpoint, quiet=quiet)
    _deliver(merged, target, html, force=force, as_json=as_json, quiet=quiet)
    if merged.missed is not None:
        raise ThresholdMissedError(merged.missed, hint="no adapter was written" if apply else None)
    if merged.refused is not None:
        raise merged.refused


def _check_combination(*, apply: bool, timm: bool, output: str | None) -> None:
    if not apply and (timm or output is not None):
        given = "--timm" if timm else "-o"
        raise UsageError(f"{given} belongs to --apply", hint=f"cadapt merge-report --apply {given} …")


def _target(source: AdapterSource, output: str | None, *, timm: bool) -> str:
    suffix = "-merged-timm" if timm else "-merged"
    return output or str(source.folder / f"{source.stem}{suffix}.safetensors")


def _check_outputs(source: AdapterSource, target: str | None, html: Path | None, *, force: bool, as_json: bool) -> None:
    """Refuse outputs that are there, or that are the adapter itself, before any work is done."""
    outputs = {} if html is None else {"--html": str(html)}
    if target is not None and target != "-":
        outputs["-o"] = target
    for name, path in outputs.items():
        if source.path is not None and Path(path).exists() and Path(path).samefile(source.path):
            raise UsageError(
                f"'{path}' is the adapter itself, which is never changed", hint=f"name another file: {name} FILE"
            )
    if len({Path(path).absolute() for path in outputs.values()}) < len(outputs):
        raise UsageError(f"--html and -o both name '{target}'", hint="name two files")
    if html is not None:
        if str(html) == "-":
            raise UsageError("--html writes a file, not stdout", hint="--html report.html")
        check_output(str(html), force=force, as_json=False)
    if target is not None:
        check_output(target, force=force, as_json=as_json)


def _merge(source: AdapterSource, options: MergeOptions, checkpoint: Path | None, *, quiet: bool) -> Merged:
    from cadapt.jobs import merge_bundle
    from cadapt.report.console import literal, stderr_console
    from cadapt.report.train import show_checking

    console = stderr_console()

    def tell(line: str) -> None:
        if not quiet:
            console.print(literal(line), soft_wrap=True, style="dim")

    size = len(source.data) if source.path is None else source.path.stat().st_size
    with show_checking(quiet=quiet or options.data is None) as on_progress:
        return merge_bundle(
            load_adapter(source),
            options,
            checkpoint=checkpoint,
            near=source.folder,
            bytes_before=size,
            tell=tell,
            on_progress=on_progress,
        )


def _deliver(merged: Merged, target: str | None, html: Path | None, *, force: bool, as_json: bool, quiet: bool) -> None:
    """Write the page, then the file, and say on stdout what was written: the file, else the page, or all as JSON."""
    from cadapt.files import write_atomically
    from cadapt.report.console import stderr_console
    from cadapt.report.merge import show_merge

    if not quiet:
        show_merge(merged.report, stderr_console())
    written: dict[str, Any] = {"output": None, "bytes": None, "html": None}
    if html is not None:
        from cadapt.report.page import render

        write_atomically(html, render(merged.report).encode(), overwrite=force)
        written["html"] = str(html)
    if target is not None and merged.data is not None:
        deliver(merged.data, target, overwrite=force)
        written |= {"output": target, "bytes": len(merged.data)}
    if not quiet:
        _say_written(written)
    if as_json:
        print_json({**merged.to_json(), **written})
    # a page is no adapter: beside --apply its path would mislead who reads the line
    line = written["output"] if target is not None else written["html"]
    if line is not None:
        print_path(line, as_json=as_json)


def _say_written(written: dict[str, Any]) -> None:
    from cadapt.report.console import amount, literal, stderr_console

    console = stderr_console()
    if written["html"] is not None:
        console.print(f"wrote {literal(written['html'])}", soft_wrap=True)
    if written["output"] is not None:
        where = "stdout" if written["output"] == "-" else literal(written["output"])
        console.print(f"wrote {where} ({amount(written['bytes'])})", soft_wrap=True)
