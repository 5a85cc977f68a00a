"""From a trained model to one ONNX file that is known to compute the same, and back to what such a file says of itself.

The pipeline is prepare → convert → tidy → verify → write, a small file each; a file that does not agree with torch is
never delivered. Names are resolved on first use, so that reading a header imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cadapt.export.latency import compare_models, measure_latency
    from cadapt.export.pipeline import export_onnx, onnx_bytes
    from cadapt.export.read import OnnxHeader, read_onnx_header
    from cadapt.export.report import Check, ExportReport

__all__ = [
    "Check",
    "ExportReport",
    "OnnxHeader",
    "compare_models",
    "export_onnx",
    "measure_latency",
    "onnx_bytes",
    "read_onnx_header",
]

_HOMES = {
    "Check": "cadapt.export.report",
    "ExportReport": "cadapt.export.report",
    "OnnxHeader": "cadapt.export.read",
    "compare_models": "cadapt.export.latency",
    "export_onnx": "cadapt.export.pipeline",
    "measure_latency": "cadapt.export.latency",
    "onnx_bytes": "cadapt.export.pipeline",
    "read_onnx_header": "cadapt.export.read",
}


def __getattr__(name: str) -> Any:
    """Import the module that holds a public name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
