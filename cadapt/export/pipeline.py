"""The export itself: prepare → convert → tidy → verify → write.

Only a file that onnxruntime runs to the same outputs as torch leaves here, to disk or as bytes for standard output.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from cadapt import __version__
from cadapt.errors import UsageError
from cadapt.export import pad_before_pool
from cadapt.export.convert import INPUT_NAME, convert
from cadapt.export.extras import WRITING, require_packages
from cadapt.export.prepare import Prepared, prepare
from cadapt.export.read import describe_model
from cadapt.export.report import Dtype, ExportReport
from cadapt.export.tidy import tidy
from cadapt.export.verify import TOLERANCES, Verdict, check_validity, verify
from cadapt.files import write_atomically
from cadapt.preprocessing import Preprocessing


def _own_metadata(
    preprocessing: Preprocessing, classes: Sequence[str], *, name: str, normalize: bool, softmax: bool
) -> dict[str, str]:
    """Return what the file's reader needs, text by key; values that are no plain words are JSON."""
    values = "RGB in [0, 1]" if normalize else "RGB in [0, 1], less mean, by std"
    shape = ["batch", *preprocessing.input_size]
    output = {"name": _output_name(softmax), "shape": ["batch", len(classes)], "classes": "in the order of `classes`"}
    return {
        "name": name,
        "classes": json.dumps(list(classes), ensure_ascii=False),
        "preprocessing": json.dumps(preprocessing.to_json()),
        "normalize": json.dumps(normalize),
        "softmax": json.dumps(softmax),
        "input": json.dumps({"name": INPUT_NAME, "shape": shape, "values": values}),
        "output": json.dumps(output),
        "cadapt_version": __version__,
    }


def _output_name(softmax: bool) -> str:
    return "probabilities" if softmax else "logits"


def _merge_metadata(own: dict[str, str], given: Mapping[str, str]) -> dict[str, str]:
    taken = sorted(own.keys() & given.keys())
    if taken:
        raise UsageError(f"metadata {', '.join(taken)} set by the export itself, expected other keys")
    return own | dict(given)


def _report(model: Any, data: bytes, prepared: Prepared, verdict: Verdict, rewrites: dict[str, int]) -> ExportReport:
    header = describe_model(model)
    return ExportReport(
        path=None,
        bytes=len(data),
        opset=header.opset,
        nodes=header.nodes,
        inputs=header.inputs,
        outputs=header.outputs,
        checks=verdict.checks,
        tolerance=0.0,
        dtype="fp32",
        seconds=0.0,
        rewrites=rewrites,
        skipped=prepared.skipped,
        torch_error=verdict.torch_error,
    )


def onnx_bytes(
    model: nn.Module,
    *,
    preprocessing: Preprocessing,
    classes: Sequence[str],
    name: str,
    metadata: Mapping[str, str] | None = None,
    normalize: bool = False,
    softmax: bool = False,
    opset: int | None = None,
    dtype: Dtype = "fp32",
    tolerance: float | None = None,
) -> tuple[bytes, ExportReport]:
    """Export a model to the bytes of a verified ONNX file.

    Args:
        model: maps ``[batch, channels, height, width]`` to ``[batch, classes]``; left as it is.
        preprocessing: its input size, and the means and deviations it expects.
        classes: class names in the order of its outputs.
        name: the graph's name.
        metadata: further text by key, such as ``base`` and ``scheme``.
        normalize: the file takes RGB in [0, 1] and normalises it itself.
        softmax: the file gives probabilities instead of logits.
        opset: ONNX operator set; None for the default.
        dtype: what the file computes in; its input and output are float32 either way.
        tolerance: on the error relative to the spread of outputs; None for 1e-4 in fp32, 2e-2 in fp16.

    Raises:
        CadaptError: a package is missing, the model cannot be converted, or the file does not agree with torch.
        UsageError: ``metadata`` holds a key that the export sets.
    """
    require_packages(WRITING, "export to ONNX")
    started = time.monotonic()
    own = _own_metadata(preprocessing, classes, name=name, normalize=normalize, softmax=softmax)
    texts = _merge_metadata(own, metadata or {})
    prepared = prepare(model, preprocessing, classes=len(classes), normalize=normalize, softmax=softmax, dtype=dtype)
    proto = convert(prepared.model, preprocessing.input_size, output_name=_output_name(softmax), opset=opset)
    pads = pad_before_pool.name_pad_axes(proto)
    tidy(proto, name=name, version=__version__, metadata=texts)
    check_validity(proto)
    data: bytes = proto.SerializeToString()
    limit = TOLERANCES[dtype] if tolerance is None else tolerance
    verdict = verify(data, prepared.reference, preprocessing, dtype=dtype, tolerance=limit)
    rewrites = prepared.rewrites | ({pad_before_pool.RULE: pads} if pads else {})
    report = _report(proto, data, prepared, verdict, rewrites)
    return data, replace(report, tolerance=limit, dtype=dtype, seconds=time.monotonic() - started)


def export_onnx(
    model: nn.Module,
    path: str | Path | None,
    *,
    preprocessing: Preprocessing,
    classes: Sequence[str],
    name: str,
    metadata: Mapping[str, str] | None = None,
    normalize: bool = False,
    softmax: bool = False,
    opset: int | None = None,
    dtype: Dtype = "fp32",
    tolerance: float | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Export a model to a verified ONNX file, written atomically; arguments as in :func:`onnx_bytes`.

    Args:
        path: the file; None to verify the export and write nothing.
        overwrite: replace a file that is there.

    Raises:
        CadaptError: as :func:`onnx_bytes`; or the file cannot be written.
        UsageError: as there; or the file exists and ``overwrite`` is false.
    """
    if path is not None and Path(path).is_file() and not overwrite:
        # said before a minute of work, and checked again by the write itself
        raise UsageError(f"'{path}' exists", hint="replace it with --force, or name another output")
    data, report = onnx_bytes(
        model,
        preprocessing=preprocessing,
        classes=classes,
        name=name,
        metadata=metadata,
        normalize=normalize,
        softmax=softmax,
        opset=opset,
        dtype=dtype,
        tolerance=tolerance,
    )
    if path is None:
        return report
    write_atomically(path, data, overwrite=overwrite)
    return replace(report, path=str(path))
