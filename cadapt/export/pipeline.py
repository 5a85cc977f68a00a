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

from cadapt.errors import UsageError
from cadapt.export import pad_before_pool
from cadapt.export.convert import INPUT_NAME, convert
from cadapt.export.extras import WRITING, require_packages
from cadapt.export.prepare import Prepared, prepare
from cadapt.export.read import describe_model
from cadapt.export.report import Dtype, ExportReport
from cadapt.export.tidy import tidy
from cadapt.export.verify import Verdict, check_validity, verify
from cadapt.files import write_atomically
from cadapt.preprocessing import Preprocessing
from cadapt.version import __version__


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


def _polish(proto: Any, name: str, metadata: Mapping[str, str]) -> dict[str, int]:
    """Apply the rules on the ONNX graph, tidy it, and return the rules applied with the number of places."""
    pads = pad_before_pool.name_pad_axes(proto)
    tidy(proto, name=name, version=__version__, metadata=metadata)
    check_validity(proto)
    return {pad_before_pool.RULE: pads} if pads else {}


def _report(
    proto: Any,
    data: bytes,
    prepared: Prepared,
    verdict: Verdict,
    rewrites: dict[str, int],
    dtype: Dtype,
    seconds: float,
) -> ExportReport:
    header = describe_model(proto)
    return ExportReport(
        path=None,
        bytes=len(data),
        opset=header.opset,
        nodes=header.nodes,
        inputs=header.inputs,
        outputs=header.outputs,
        checks=verdict.checks,
        tolerance=verdict.tolerance,
        dtype=dtype,
        seconds=seconds,
        rewrites=prepared.rewrites | rewrites,
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
        name, metadata: the graph's name, and further text by key, such as ``base`` and ``scheme``.
        normalize: the file takes RGB in [0, 1] and normalises it itself.
        softmax: the file gives probabilities instead of logits.
        opset: ONNX operator set; None for the default.
        dtype: what the file computes in; input and output are float32 either way.
        tolerance: on the error relative to the spread of outputs; None for 1e-4 in fp32, 2e-2 in fp16.

    Raises:
        CadaptError: a package is missing, the model cannot be converted, the file does not agree with torch; a
            UsageError for an unknown opset or a metadata key that the export sets itself.
    """
    started = time.monotonic()
    require_packages(WRITING, "export to ONNX")
    own = _own_metadata(preprocessing, classes, name=name, normalize=normalize, softmax=softmax)
    texts = _merge_metadata(own, metadata or {})
    prepared = prepare(model, preprocessing, classes=len(classes), normalize=normalize, softmax=softmax, dtype=dtype)
    proto = convert(prepared.model, preprocessing.input_size, output_name=_output_name(softmax), opset=opset)
    rewrites = _polish(proto, name, texts)
    data: bytes = proto.SerializeToString()
    verdict = verify(data, prepared.reference, preprocessing, dtype=dtype, tolerance=tolerance)
    return data, _report(proto, data, prepared, verdict, rewrites, dtype, time.monotonic() - started)


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
    """Export a model to a verified ONNX file, written atomically; see :func:`onnx_bytes` for the other arguments.

    ``path`` None verifies the export and writes nothing; ``overwrite`` replaces a file that is there.

    Raises:
        CadaptError: as there; or the file exists (a UsageError) or cannot be written.
    """
    if path is not None and Path(path).is_file() and not overwrite:
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
