"""``cadapt inspect``: what a model, a checkpoint, an adapter file or an ONNX file is. An adapter needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from cadapt.cli._options import AsJson, Quiet
from cadapt.cli._schemes import LISTED
from cadapt.cli._streams import find_adapter, naming_stdin, print_json
from cadapt.errors import CadaptError, RefusedError, UsageError

EXAMPLE = (
    "cadapt inspect resnet50 --schemes; cadapt inspect 'convnext*' --scheme lora; cadapt inspect adapter.safetensors"
)
_CHECKPOINTS = (".safetensors", ".pth", ".pt", ".bin", ".tar")


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What is to be shown of a target, and how."""

    sites: bool
    all_schemes: bool
    schemes: tuple[str, ...]
    img_size: int | None
    batch_size: int | None
    as_json: bool
    quiet: bool

    def give(self, record: dict[str, Any], show: Any) -> None:
        """Print the record, or show it to people."""
        if self.as_json:
            print_json(record)
        elif not self.quiet:
            show()

    def choose(self, usual: tuple[str, ...]) -> tuple[str, ...]:
        """The schemes to compare: those asked for, or the usual ones.

        Raises:
            UsageError: one is unknown.
        """
        from cadapt.describe.schemes import all_schemes, read_schemes

        return all_schemes() if self.all_schemes else read_schemes(self.schemes) or usual


def command(
    target: Annotated[
        str, typer.Argument(help="A timm model or a glob of them, a checkpoint, an adapter or ONNX file, or - (stdin).")
    ],
    schemes: Annotated[bool, typer.Option("--schemes", help="Compare all schemes.")] = False,
    scheme: Annotated[
        list[str] | None,
        typer.Option("--scheme", metavar="NAMES", help=f"Compare these, as lora,ssf or bias+norm. There are {LISTED}."),
    ] = None,
    sites: Annotated[bool, typer.Option("--sites", help="List the sites.")] = False,
    backbone: Annotated[
        str | None, typer.Option("--backbone", metavar="MODEL", help="The timm model a checkpoint is for.")
    ] = None,
    img_size: Annotated[int | None, typer.Option("--img-size", min=1, help="Input size in pixels.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Count activation memory for a batch, not a picture.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show what is in a model or a file.

    For a model: stages, blocks and sites, and what schemes would add (parameters, MACs, activation memory), and whether
    they merge; with --schemes all of them on one screen. For a glob: a row for each model, a column for each scheme.
    """
    if schemes and scheme:
        raise UsageError("--schemes compares all schemes, --scheme only some", hint="leave one out")
    named = tuple(scheme or ())
    asked = _Asked(
        sites=sites, all_schemes=schemes, schemes=named, img_size=img_size, batch_size=batch_size, as_json=as_json,
        quiet=quiet,
    )  # fmt: skip
    path = Path(target)
    if target == "-" or path.is_file():
        _inspect_file(target, backbone, asked)
        return
    if path.suffix in (*_CHECKPOINTS, ".onnx") or "/" in target:
        raise CadaptError(
            f"no file at '{target}'", hint="a timm model is named without a suffix: cadapt inspect resnet50"
        )
    if not any(mark in target for mark in "*?["):
        _inspect_model(target, asked)
        return
    if sites:
        raise UsageError("--sites lists those of one model", hint="cadapt inspect MODEL --sites")
    if batch_size is not None:
        raise UsageError("--batch-size counts the memory of one model", hint="cadapt inspect MODEL --batch-size")
    if backbone is not None:
        raise UsageError("--backbone names the model of a checkpoint", hint="cadapt inspect FILE --backbone MODEL")
    _inspect_glob(target, asked)


def _inspect_model(name: str, asked: _Asked) -> None:
    from cadapt.describe.model import describe_architecture
    from cadapt.describe.schemes import USUAL_SCHEMES
    from cadapt.report.counting import show_counting
    from cadapt.report.describe import show_model

    chosen = asked.choose(USUAL_SCHEMES)
    with show_counting("comparing schemes", quiet=asked.quiet) as progress:
        summary = describe_architecture(name, asked.img_size, chosen, progress, asked.batch_size)
    asked.give(summary.to_json(), lambda: show_model(summary, sites=asked.sites, only_schemes=asked.all_schemes))


def _inspect_glob(glob: str, asked: _Asked) -> None:
    from cadapt.describe.listing import USUAL_COLUMNS, list_architectures
    from cadapt.report.counting import show_counting
    from cadapt.report.listing import show_listing

    chosen = asked.choose(USUAL_COLUMNS)
    with show_counting("surveying models", quiet=asked.quiet) as progress:
        listing = list_architectures(glob, asked.img_size, chosen, progress=progress)
    asked.give(listing.to_json(), lambda: show_listing(listing))
    if listing.failed == len(listing.models):
        raise CadaptError(f"no model that matches '{glob}' could be surveyed", hint=listing.models[0].error)


def _inspect_file(target: str, backbone: str | None, asked: _Asked) -> None:
    path = Path(target)
    if backbone is None and (asked.all_schemes or asked.schemes):
        raise UsageError("schemes are compared on a model, not on a file", hint="cadapt inspect MODEL --schemes")
    if backbone is None and asked.batch_size is not None:
        raise UsageError("--batch-size counts a model's memory, not a file's", hint="cadapt inspect MODEL --batch-size")
    if target == "-":
        source = find_adapter("-")
        _show_adapter(source.content, str(source.path or "stdin"), asked)
        return
    if path.suffix == ".onnx":
        from cadapt.export import read_onnx_header
        from cadapt.report.describe import show_facts

        facts = read_onnx_header(path).to_json()
        asked.give({"schema": 1, "kind": "onnx", **facts}, lambda: show_facts(f"{path}: ONNX", facts))
        return
    if backbone is None and path.suffix == ".safetensors" and _is_adapter(path):
        _show_adapter(path, str(path), asked)
        return
    if path.suffix not in _CHECKPOINTS:
        raise UsageError(f"{path} is no file that cadapt knows", hint=f"expected {', '.join(_CHECKPOINTS)} or .onnx")
    _show_checkpoint(path, backbone, asked)


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


def _show_adapter(content: Path | bytes, name: str, asked: _Asked) -> None:
    from cadapt.bundle import read_header

    with naming_stdin():
        header = read_header(content)

    def show() -> None:
        from cadapt.report.describe import show_header

        show_header(header, name)

    asked.give({"schema": 1, "kind": "adapter", **header.to_json()}, show)


def _show_checkpoint(path: Path, backbone: str | None, asked: _Asked) -> None:
    from cadapt.checkpoints import read_checkpoint
    from cadapt.report.describe import show_facts

    if backbone is not None:
        _show_weights(path, backbone, asked)
        return
    if asked.sites:
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
    asked.give({"schema": 1, "kind": "checkpoint", **facts}, lambda: show_facts(f"{path}: weights", facts))


def _show_weights(path: Path, backbone: str, asked: _Asked) -> None:
    """Show the model that a checkpoint makes of an architecture."""
    from cadapt.backbone import load_backbone
    from cadapt.describe.model import summarise
    from cadapt.describe.schemes import USUAL_SCHEMES
    from cadapt.report.describe import show_model

    chosen = asked.choose(USUAL_SCHEMES)
    loaded = load_backbone(backbone, checkpoint=path, img_size=asked.img_size)
    summary = summarise(loaded, chosen, batch=asked.batch_size)
    asked.give(summary.to_json(), lambda: show_model(summary, sites=asked.sites, only_schemes=asked.all_schemes))
