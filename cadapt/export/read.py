"""What an ONNX file says of itself: names, shapes, class names, preprocessing. Imports no torch.

``cadapt inspect FILE.onnx`` shows it. Any ONNX file can be read; the metadata of another producer are shown as found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cadapt.errors import CadaptError, RefusedError
from cadapt.export.extras import READING, require_packages
from cadapt.export.report import TensorInfo


@dataclass(frozen=True, kw_only=True)
class OnnxHeader:
    """An ONNX file without its weights.

    ``metadata`` is text by key, as in the file; an exported file has ``classes`` and ``preprocessing`` as JSON.
    ``initializer_bytes`` is the size of the weights, ``producer`` the program that wrote it with its version.
    """

    metadata: Mapping[str, str]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    opset: int
    nodes: int
    initializer_bytes: int
    producer: str

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object; tuples become lists."""
        return asdict(self)


def read_onnx_header(path: str | Path) -> OnnxHeader:
    """Read the header of an ONNX file.

    Raises:
        RefusedError: the file is damaged or is no ONNX file.
        CadaptError: there is no such file, or onnx is not installed.
    """
    require_packages(READING, "read an ONNX file")
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise CadaptError(f"cannot read {path}: {error.strerror}") from error
    try:
        model = onnx.load_model_from_string(data)
    except DecodeError as error:
        raise RefusedError(f"{path} is not an ONNX file, or is damaged: {error}") from error
    if model.ir_version < 1 or not model.opset_import or not model.graph.output:
        raise RefusedError(f"{path} is not an ONNX file, or is damaged: it holds no graph")
    return describe_model(model)


def describe_model(model: Any) -> OnnxHeader:
    """Return the header of an ``onnx.ModelProto``."""
    graph = model.graph
    weights = {item.name for item in graph.initializer}
    versions = [int(item.version) for item in model.opset_import if item.domain in ("", "ai.onnx")]
    return OnnxHeader(
        metadata={item.key: item.value for item in model.metadata_props},
        inputs=tuple(_describe(item) for item in graph.input if item.name not in weights),
        outputs=tuple(_describe(item) for item in graph.output),
        opset=max(versions, default=0),
        nodes=len(graph.node),
        initializer_bytes=sum(_count_bytes(item) for item in graph.initializer),
        producer=f"{model.producer_name} {model.producer_version}".strip(),
    )


def _describe(value: Any) -> TensorInfo:
    tensor = value.type.tensor_type
    shape = tuple(
        int(size.dim_value) if size.HasField("dim_value") else str(size.dim_param or "?") for size in tensor.shape.dim
    )
    return TensorInfo(name=value.name, dtype=_dtype_name(tensor.elem_type), shape=shape)


def _dtype_name(element: int) -> str:
    import onnx

    known = onnx.TensorProto.DataType.values()
    return str(onnx.TensorProto.DataType.Name(element)).lower() if element in known else f"type {element}"


def _count_bytes(tensor: Any) -> int:
    import onnx

    if tensor.raw_data:
        return len(tensor.raw_data)
    known = onnx.helper.get_all_tensor_dtypes()
    if tensor.data_type not in known or tensor.data_type == onnx.TensorProto.STRING:
        return 0
    return int(math.prod(tensor.dims)) * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
