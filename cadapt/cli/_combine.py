"""``cadapt merge-report a.safetensors b.safetensors``: whether adapters can be combined, and the combination."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cadapt.cli._streams import (
    AdapterSource,
    check_output,
    deliver,
    find_adapter,
    load_adapter,
    print_json,
    print_path,
)
from cadapt.errors import UsageError

if TYPE_CHECKING:
    from cadapt.bundle import Bundle
    from cadapt.combining import Settings
    from cadapt.jobs.combining import Combined, CombineOptions

# options of the command that only make sense for one file, and for several
_OF_ONE = (
    *("model", "fit", "fit_data", "fit_images", "tolerance", "finetune_epochs"),
    *("dense", "dtype", "latency", "timm"),
)
_OF_SEVERAL = ("method", "weights", "density", "scale")
_DEFAULT_OUTPUT = "combined.safetensors"


def single_file(context: typer.Context) -> str | None:
    """The one adapter that a command line names, None for the usual places; refuses what is for several.

    Raises:
        UsageError: an option for several adapters was given, a file both ways, or several sources of pictures.
    """
    files, model = context.params["files"] or [], context.params["model"]
    given = _given(context, _OF_SEVERAL)
    if given:
        raise UsageError(
            f"{given[0]} is for several adapters, and {len(files) or 'no'} file was named",
            hint=f"cadapt merge-report a.safetensors b.safetensors {given[0]} …",
        )
    if files and model is not None:
        raise UsageError(f"an adapter was named twice: '{files[0]}' and -m {model}", hint="leave one out")
    if len(context.params["data"] or []) > 1:
        raise UsageError(
            f"got --data {len(context.params['data'])} times for one adapter", hint="give one source of pictures"
        )
    file: str | None = files[0] if files else model
    return file


def combine_files(context: typer.Context) -> None:
    """Compare the adapters of a command line, show the report, and write the combination where it is asked for."""
    params = context.params
    given = _given(context, _OF_ONE)
    if given:
        raise UsageError(f"{given[0]} is for one adapter, and {len(params['files'])} were named", hint="leave it out")
    if params["output"] is not None and not params["apply"]:
        raise UsageError("-o belongs to --apply", hint="cadapt merge-report a b --apply -o FILE")
    sources = [find_adapter(name) for name in params["files"]]
    target = (params["output"] or str(sources[0].folder / _DEFAULT_OUTPUT)) if params["apply"] else None
    _check_outputs(sources, target, params)
    options = _options(params, len(sources))
    combined = _combine(sources, options, params)
    _deliver(combined, target, params)


def _given(context: typer.Context, names: Sequence[str]) -> list[str]:
    """Those of some options that stand on the command line, as they are written there."""
    flags = {item.name: item.opts[0] for item in context.command.params}
    sources = {name: context.get_parameter_source(name) for name in names}
    return [flags[name] for name, found in sources.items() if found is not None and found.name == "COMMANDLINE"]


def _check_outputs(sources: Sequence[AdapterSource], target: str | None, params: dict[str, Any]) -> None:
    """Refuse outputs that are there, or that are one of the adapters, before any work is done."""
    html = None if params["html"] is None else str(params["html"])
    if html == "-":
        raise UsageError("--html writes a file, not stdout", hint="--html report.html")
    for option, output in (("-o", target), ("--html", html)):
        if output is None:
            continue
        for source in sources:
            if output != "-" and source.path is not None and Path(output).exists():
                _require_other(option, output, source.path)
        check_output(output, force=params["force"], as_json=params["as_json"] and option == "-o")
    if target is not None and html is not None and Path(target).absolute() == Path(html).absolute():
        raise UsageError(f"--html and -o both name '{target}'", hint="name two files")


def _require_other(option: str, output: str, adapter: Path) -> None:
    if Path(output).samefile(adapter):
        raise UsageError(
            f"'{output}' is one of the adapters, which are never changed", hint=f"name another file: {option} FILE"
        )


def _options(params: dict[str, Any], count: int) -> CombineOptions:
    from cadapt.jobs.combining import CombineOptions

    return CombineOptions(
        settings=_settings(params, count),
        method=params["method"],
        data=tuple(params["data"] or ()),
        apply=params["apply"],
        device=params["device"] or "auto",
        workers=params["workers"],
        skip_bad=params["skip_bad"],
    )


def _settings(params: dict[str, Any], count: int) -> Settings:
    from cadapt.combining import Settings

    text = params["weights"]
    try:
        weights = (1.0,) * count if text is None else tuple(float(item) for item in text.split(","))
    except ValueError as error:
        raise UsageError(f"weights are '{text}', expected numbers with commas between", hint="--weights 1,1") from error
    given = {name: params[name] for name in ("density", "scale") if params[name] is not None}
    return Settings(weights=weights, seed=params["seed"], **given)


def _combine(sources: Sequence[AdapterSource], options: CombineOptions, params: dict[str, Any]) -> Combined:
    from cadapt.jobs.combining import combine_bundles, name_tasks
    from cadapt.report.console import literal, stderr_console
    from cadapt.report.train import show_checking

    def tell(line: str) -> None:
        if not params["quiet"]:
            stderr_console().print(literal(line), soft_wrap=True, style="dim")

    names = name_tasks([source.path or Path("stdin") for source in sources])
    bundles: dict[str, Bundle] = {name: load_adapter(source) for name, source in zip(names, sources, strict=True)}
    with show_checking(quiet=params["quiet"] or not options.data) as on_progress:
        return combine_bundles(
            bundles,
            options,
            checkpoint=params["checkpoint"],
            near=sources[0].folder,
            on_note=tell,
            on_progress=on_progress,
        )


def _deliver(combined: Combined, target: str | None, params: dict[str, Any]) -> None:
    """Show the report, write the page and the file, and say on stdout what was written, or all as JSON."""
    from cadapt.bundle import bundle_bytes
    from cadapt.files import write_atomically
    from cadapt.report.combine import show_combination
    from cadapt.report.console import amount, literal, stderr_console

    report, html, quiet = combined.report, params["html"], params["quiet"]
    if not quiet:
        show_combination(report, stderr_console())
    written: dict[str, Any] = {"output": None, "bytes": None, "html": None}
    if html is not None:
        from cadapt.report.combine_page import render

        write_atomically(html, render(report).encode(), overwrite=params["force"])
        written["html"] = str(html)
    if target is not None and combined.bundle is not None:
        content = bundle_bytes(combined.bundle)
        deliver(content, target, overwrite=params["force"])
        written |= {"output": target, "bytes": len(content)}
        if not quiet:
            where = "stdout" if target == "-" else target
            stderr_console().print(f"wrote {literal(where)} ({amount(len(content))}), by {report.applied}")
    if params["as_json"]:
        print_json({**report.to_json(), **written})
    line = written["output"] if target is not None else written["html"]
    if line is not None:
        print_path(line, as_json=params["as_json"])
