"""``cadapt export``: the adapter alone, a full timm checkpoint, or a verified ONNX model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cadapt.cli._options import Adapter, AsJson, Checkpoint, Force, Output, Quiet
from cadapt.cli._streams import check_output, deliver, find_adapter, load_adapter, print_json, print_path
from cadapt.errors import UsageError

if TYPE_CHECKING:
    from cadapt.bundle import Bundle

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
    if onnx:
        data, record = _onnx(bundle, checkpoint, source.folder, dtype, normalize, softmax, opset, quiet=quiet)
    elif timm:
        data, record = _timm(bundle, checkpoint, source.folder, dtype)
    else:
        from cadapt.jobs import convert_bundle

        data, record = convert_bundle(bundle, dtype), {"kind": "adapter", "dtype": dtype}
    deliver(data, target, overwrite=force)
    if not quiet:
        from cadapt.report.console import amount, stderr_console

        stderr_console().print(f"wrote {'stdout' if target == '-' else target} ({amount(len(data))})", markup=False)
    if as_json and target != "-":
        print_json({"schema": 1, **record, "output": target, "bytes": len(data)})
    print_path(target, as_json=as_json)


def _onnx(
    bundle: Bundle,
    checkpoint: Path | None,
    near: Path,
    dtype: str,
    normalize: bool,
    softmax: bool,
    opset: int | None,
    *,
    quiet: bool,
) -> tuple[bytes, dict[str, Any]]:
    from cadapt.export import onnx_bytes
    from cadapt.jobs import trained_model
    from cadapt.merging import merge
    from cadapt.report.export import show_export

    adapted = trained_model(bundle, checkpoint=checkpoint, near=near)
    # what folds into the base costs nothing at inference; what does not keeps its place in the graph
    merged, _ = merge(adapted)
    plan = bundle.plan
    data, report = onnx_bytes(
        merged,
        preprocessing=bundle.preprocessing,
        classes=bundle.classes,
        name=f"{plan.base.name}-{plan.scheme}",
        metadata={"base": json.dumps(_base(bundle)), "scheme": plan.scheme},
        normalize=normalize,
        softmax=softmax,
        opset=opset,
        dtype=dtype,  # type: ignore[arg-type]
    )
    if not quiet:
        show_export(report)
    return data, {"kind": "onnx", **report.to_json()}


def _timm(bundle: Bundle, checkpoint: Path | None, near: Path, dtype: str) -> tuple[bytes, dict[str, Any]]:
    import torch
    from safetensors.torch import save

    from cadapt.jobs import trained_model
    from cadapt.merging import merge, timm_state_dict

    kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if dtype not in kinds:
        raise UsageError(f"unknown dtype '{dtype}'", hint=f"one of {', '.join(kinds)}")
    merged, report = merge(trained_model(bundle, checkpoint=checkpoint, near=near))
    tensors = {
        name: (tensor.to(kinds[dtype]) if tensor.is_floating_point() else tensor).contiguous().clone()
        for name, tensor in timm_state_dict(merged).items()
    }
    architecture = bundle.plan.base.name.partition(".")[0]
    facts = {
        "architecture": architecture,
        "num_classes": len(bundle.classes),
        "classes": list(bundle.classes),
        "preprocessing": bundle.preprocessing.to_json(),
        "settings": dict(bundle.plan.base.settings),
    }
    metadata = {"format": "pt", "timm": json.dumps(facts)}
    return save(tensors, metadata), {"kind": "timm", "dtype": dtype, "merged": report.merged, **facts}


def _base(bundle: Bundle) -> dict[str, Any]:
    base = bundle.plan.base
    return {"name": base.name, "source": base.source, "checkpoint": base.checkpoint, "sha256": base.sha256}
