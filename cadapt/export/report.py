"""What an export did and how far its file is from torch: frozen values with JSON out.

The command line shows them and tests compare them. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Optimisation = Literal["off", "default"]
Dtype = Literal["fp32", "fp16"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison of the file, run by onnxruntime, with the torch model on the same images.

    ``relative_error`` is ``max_abs_error`` divided by the scale of the outputs: how far they move from image to image.
    ``argmax_agreement`` is the share of images on which both name the same class.
    """

    batch: int
    optimisation: Optimisation
    max_abs_error: float
    relative_error: float
    argmax_agreement: float


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """An input or output of a file: its name, element type and shape, where a word stands for a free dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """An exported, verified model.

    ``path`` is None when the bytes went elsewhere. ``rewrites`` names each rule applied to the model with the number
    of places; ``skipped`` says of each layer that a rule refused where and why. ``torch_error`` is torch's own fp32
    error relative to fp64 on the same scale, computed only where the file was off by more than the tolerance.
    """

    path: str | None
    bytes: int
    opset: int
    nodes: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    checks: tuple[Check, ...]
    tolerance: float
    dtype: Dtype
    seconds: float
    rewrites: Mapping[str, int] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    torch_error: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object: tuples as lists, sizes in bytes, times in seconds."""
        return asdict(self)
