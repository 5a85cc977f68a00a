"""``cadapt inspect``: what a model, a checkpoint, an adapter file or an ONNX file is. An adapter needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cadapt.cli._options import AsJson, Quiet
from cadapt.cli._streams import find_adapter, naming_stdin, print_json
from cadapt.errors import CadaptError, RefusedError, UsageError

EXAMPLE = "cadapt inspect resnet50 --sites; cadapt inspect 'convnext*'; cadapt inspect adapter.safetensors"
_CHECKPOINTS = (".safetensors", ".pth", ".pt", ".bin", ".tar")


def command(
    target: Annotated[
        str, typer.Argument(help="A timm model or a glob of them, a checkpoint, an adapter or ONNX file, or - (stdin).")
    ],
    sites: Annotated[bool, typer.Option("--sites", help="List every site.")] = False,
    backbone: Annotated[
        str | None, typer.Option("--backbone", metavar="MODEL", help="The timm model a checkpoint is for.")
    ] = None,
    img_size: Annotated[int | None, typer.Option("--img-size", min=1, help="Input size in pixels.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show what is in a model or a file.

    For a model: stages, blocks and sites, and what each scheme would add (parameters, MACs, activation memory). For a
    glob: a row for each model, with what each scheme would add.
    """
    if target == "-":
        source = find_adapter("-")
        _show_adapter(source.content, str(source.path or "stdin"), as_json=as_json, quiet=quiet)
        return
    path = Path(target)
    if path.is_file():
        _inspect_file(path, backbone, sites=sites, img_size=img_size, as_json=as_json, quiet=quiet)
        return
    if path.suffix in (*_CHECKPOINTS, ".onnx") or "/" in target:
        raise CadaptError(
            f"no file at '{target}'", hint="a timm model is named without a suffix: cadapt inspect resnet50"
        )
    if any(mark in target for mark in "*?["):
        if sites:
            raise UsageError("--sites lists those of one model", hint="cadapt inspect MODEL --sites")
        if backbone is not None:
            raise UsageError("--backbone names the model of a checkpoint", hint="cadapt inspect FILE --backbone MODEL")
        _inspect_glob(target, img_size=img_size, as_json=as_json, quiet=quiet)
        return
    _inspect_model(target, sites=sites, img_size=img_size, as_json=as_json, quiet=quiet)


def _give(record: dict[str, Any], as_json: bool, quiet: bool, show: Any) -> None:
    if as_json:
        print_json(record)
    elif not quiet:
        show()


def _inspect_model(name: str, *, sites: bool, img_size: int | None, as_json: bool, quiet: bool) -> None:
    from cadapt.describe.model import describe_architecture
    from cadapt.report.describe import show_model

    summary = describe_architecture(name, img_size)
    _give(summary.to_json(), as_json, quiet, lambda: show_model(summary, sites=sites))


def _inspect_glob(glob: str, *, img_size: int | None, as_json: bool, quiet: bool) -> None:
    from cadapt.describe.listing import list_architectures
    from cadapt.report.listing import show_listing, show_surveying

    with show_surveying(quiet=quiet) as progress:
        listing = list_architectures(glob, img_size, progress=progress)
    _give(listing.to_json(), as_json, quiet, lambda: show_listing(listing))
    if listing.failed == len(listing.models):
        raise CadaptError(f"no model that matches '{glob}' could be surveyed", hint=listing.models[0].error)


def _inspect_file(
    path: Path, backbone: str | None, *, sites: bool, img_size: int | None, as_json: bool, quiet: bool
) -> None:
    if path.suffix == ".onnx":
        from cadapt.export import read_onnx_header
        from cadapt.report.describe import show_facts

        facts = read_onnx_header(path).to_json()
        _give({"schema": 1, "kind": "onnx", **facts}, as_json, quiet, lambda: show_facts(f"{path}: ONNX", facts))
        return
    if backbone is None and path.suffix == ".safetensors" and _is_adapter(path):
        _show_adapter(path, str(path), as_json=as_json, quiet=quiet)
        return
    if path.suffix not in _CHECKPOINTS:
        raise UsageError(f"{path} is no file that cadapt knows", hint=f"expected {', '.join(_CHECKPOINTS)} or .onnx")
    _show_checkpoint(path, backbone, sites=sites, img_size=img_size, as_json=as_json, quiet=quiet)


def _is_adapter(path: Path) -> bool:
    """Whether a safetensors file says it is an adapter; a damaged one is for the adapter's reader to refuse."""
    try:
        return "cadapt" in _metadata(path)
    except RefusedError:
        return True


def _metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself."""
    from cadapt.bundle.container import LENGTH_BYTES, check_length, parse_header

    size = path.stat().st_size
    with path.open("rb") as handle:
        length = check_length(handle.read(LENGTH_BYTES + 1), size)
        handle.seek(LENGTH_BYTES)
        return dict(parse_header(handle.read(length), size).metadata)


def _show_adapter(content: Path | bytes, name: str, *, as_json: bool, quiet: bool) -> None:
    from cadapt.bundle import read_header

    with naming_stdin():
        header = read_header(content)
    if as_json:
        print_json({"schema": 1, "kind": "adapter", **header.to_json()})
        return
    if not quiet:
        from cadapt.report.describe import show_header

        show_header(header, name)


def _show_checkpoint(
    path: Path, backbone: str | None, *, sites: bool, img_size: int | None, as_json: bool, quiet: bool
) -> None:
    from cadapt.backbone import load_backbone
    from cadapt.checkpoints import read_checkpoint
    from cadapt.describe.model import summarise
    from cadapt.report.describe import show_facts, show_model

    if backbone is not None:
        summary = summarise(load_backbone(backbone, checkpoint=path, img_size=img_size))
        _give(summary.to_json(), as_json, quiet, lambda: show_model(summary, sites=sites))
        return
    if sites:
        raise UsageError(f"the sites of {path} are its model's", hint=f"cadapt inspect {path} --backbone MODEL --sites")
    tensors = read_checkpoint(path)
    facts: dict[str, Any] = {
        "tensors": len(tensors),
        "values": sum(item.numel() for item in tensors.values()),
        "bytes": path.stat().st_size,
        "dtypes": sorted({str(item.dtype).removeprefix("torch.") for item in tensors.values()}),
        "first": next(iter(tensors)),
        "last": next(reversed(tensors)),
    }
    if path.suffix == ".safetensors":
        facts["metadata"] = _metadata(path)
    _give({"schema": 1, "kind": "checkpoint", **facts}, as_json, quiet, lambda: show_facts(f"{path}: weights", facts))
