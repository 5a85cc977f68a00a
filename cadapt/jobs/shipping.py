"""Shipping a trained adapter: its own file in another dtype, a checkpoint for timm, or a verified ONNX model."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cadapt.bundle import Bundle, bundle_bytes
from cadapt.errors import CadaptError, UsageError, close_matches
from cadapt.export import ExportReport, onnx_bytes
from cadapt.jobs.judging import trained_model
from cadapt.jobs.packing import pack_bundle
from cadapt.merging import checkpoint_bytes, checkpoint_facts, merge

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_ONNX_DTYPES = ("fp32", "fp16")


@dataclass(frozen=True, kw_only=True)
class Shipment:
    """A file to deliver, the facts about it as JSON, and for ONNX the checks it passed."""

    data: bytes
    facts: dict[str, Any]
    report: ExportReport | None = None


def ship_adapter(bundle: Bundle, dtype: str = "fp32") -> Shipment:
    """The adapter file with its floating tensors in another dtype; buffers of counts stay whole numbers.

    Adapters whose scheme has a form for storage (Consolidator's branches, summed into one sparse matrix) are in that
    form, with its settings in the plan: an equal adapter of fewer numbers, computed in fp64 and rounded once.
    ``packed`` of the facts counts them.

    Raises:
        UsageError: an unknown dtype.
        CadaptError: a value would overflow in it.
        RefusedError: the tensors are not those the plan calls for.
    """
    _check_dtype(dtype)
    packed, count = pack_bundle(bundle)
    tensors = {name: _convert(name, tensor, dtype) for name, tensor in packed.tensors.items()}
    facts = {"kind": "adapter", "dtype": dtype, "packed": count}
    return Shipment(data=bundle_bytes(replace(packed, tensors=tensors)), facts=facts)


def ship_timm(
    bundle: Bundle, dtype: str = "fp32", *, checkpoint: Path | None = None, near: Path | None = None
) -> Shipment:
    """A full checkpoint that ``timm.create_model(architecture, num_classes=N)`` loads strictly.

    Its metadata says under ``timm`` which architecture, classes and preprocessing it is for. Where a layer had to
    become a plain one to take its adapter up, ``plain`` of the facts names it, and :func:`cadapt.merging.load_merged`
    loads the file in place of timm.

    Raises:
        UsageError: an unknown dtype.
        CadaptError: adapters are left that timm has no place for, with the reason, or a value would overflow.
    """
    _check_dtype(dtype)
    merged, report = merge(trained_model(bundle, checkpoint=checkpoint, near=near))
    data = checkpoint_bytes(merged, dtype=_DTYPES[dtype])
    return Shipment(
        data=data, facts={"kind": "timm", "dtype": dtype, "merged": report.merged, **checkpoint_facts(merged)}
    )


def ship_onnx(
    bundle: Bundle,
    dtype: str = "fp32",
    *,
    normalize: bool = False,
    softmax: bool = False,
    opset: int | None = None,
    checkpoint: Path | None = None,
    near: Path | None = None,
) -> Shipment:
    """One ONNX model, with what folds into the base folded; see :func:`cadapt.export.onnx_bytes`.

    Raises:
        UsageError: a dtype that is unknown, or not for ONNX.
        CadaptError: the adapter was never trained, or the file does not agree with torch.
    """
    _check_dtype(dtype)
    if dtype not in _ONNX_DTYPES:
        raise UsageError(f"an ONNX file computes in {' or '.join(_ONNX_DTYPES)}, not in {dtype}", hint="--dtype fp16")
    merged, _ = merge(trained_model(bundle, checkpoint=checkpoint, near=near))
    base = bundle.plan.base
    identity = {"name": base.name, "source": base.source, "checkpoint": base.checkpoint, "sha256": base.sha256}
    data, report = onnx_bytes(
        merged,
        preprocessing=bundle.preprocessing,
        classes=bundle.classes,
        name=f"{base.name}-{bundle.plan.scheme}",
        metadata={"base": json.dumps(identity), "scheme": bundle.plan.scheme},
        normalize=normalize,
        softmax=softmax,
        opset=opset,
        dtype=dtype,  # type: ignore[arg-type]
    )
    return Shipment(data=data, facts={"kind": "onnx", **report.to_json()}, report=report)


def _check_dtype(dtype: str) -> None:
    if dtype not in _DTYPES:
        raise UsageError(f"unknown dtype '{dtype}'", hint=close_matches(dtype, _DTYPES))


def _convert(name: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    _check_dtype(dtype)
    if not tensor.is_floating_point():
        return tensor
    converted = tensor.to(_DTYPES[dtype])
    if not bool(torch.isfinite(converted).all()) and bool(torch.isfinite(tensor).all()):
        raise CadaptError(f"'{name}' does not fit into {dtype}: it would overflow", hint="--dtype bf16")
    return converted
