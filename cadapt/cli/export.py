"""``cadapt export``: the adapter alone, a full timm checkpoint, or a verified ONNX model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cadapt.cli._options import Adapter, AsJson, Checkpoint, Force, Output, Quiet
from cadapt.cli._streams import check_output, deliver, find_adapter, load_adapter, print_json, print_path
from cadapt.errors import UsageError

EXAMPLE = "cadapt export --onnx --normalize --softmax; cadapt export --dtype fp16; cadapt export --timm"


def command(
    model: Adapter = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="One ONNX model, checked against torch in onnxruntime.")] = False,
    timm: Annotated[
        bool, typer.Option("--timm", help="A full checkpoint that timm loads, where all folds in.")
    ] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="fp32, fp16 or bf16 (ONNX: fp32 or fp16).")] = "fp32",
    normalize: Annotated[
        bool, typer.Option("--normalize", help="ONNX: take RGB in [0, 1] and normalise inside the graph.")
    ] = False,
    softmax: Annotated[bool, typer.Option("--softmax", help="ONNX: give probabilities.")] = False,
    opset: Annotated[int | None, typer.Option("--opset", help="ONNX operator set.")] = None,
    checkpoint: Checkpoint = None,
    output: Output = None,
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Ship an adapter: by itself (the default), as a timm checkpoint, or as ONNX.

    An ONNX file that does not agree with torch at batches 1, 2, 3 and 7 is not delivered.
    """
    if onnx and timm:
        raise UsageError("--onnx and --timm are two exports", hint="run export twice")
    if not onnx and (normalize or softmax or opset is not None):
        raise UsageError("--normalize, --softmax and --opset belong to --onnx", hint="cadapt export --onnx …")
    source = find_adapter(model)
    suffix = ".onnx" if onnx else "-timm.safetensors" if timm else f"-{dtype}.safetensors"
    target = output or str(source.folder / f"{source.stem}{suffix}")
    check_output(target, force=force, as_json=as_json)
    bundle = load_adapter(source)
    from cadapt.jobs import ship_adapter, ship_onnx, ship_timm

    places: dict[str, Any] = {"checkpoint": checkpoint, "near": source.folder}
    if onnx:
        shipped = ship_onnx(bundle, dtype, normalize=normalize, softmax=softmax, opset=opset, **places)
    elif timm:
        shipped = ship_timm(bundle, dtype, **places)
    else:
        shipped = ship_adapter(bundle, dtype)
    deliver(shipped.data, target, overwrite=force)
    if not quiet:
        from cadapt.report.export import show_shipped

        show_shipped(shipped, target)
    if as_json:
        print_json({"schema": 1, **shipped.facts, "output": target, "bytes": len(shipped.data)})
    print_path(target, as_json=as_json)
