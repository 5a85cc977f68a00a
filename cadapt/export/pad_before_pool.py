"""Rule: spell out the axes of a constant Pad that feeds a pooling, so that onnxruntime does not merge the two.

onnxruntime's default ``Pad_Fusion`` (seen in 1.31) moves a zero Pad into the pooling's own padding. A max-pool pads
with -inf and not with zero, so wherever activations are negative the result changes; BiT's stem is such a place. The
fusion leaves a Pad that names its axes alone, and naming all of them changes nothing else.
"""

from __future__ import annotations

from typing import Any

RULE = "name the axes of a Pad before a pooling"

_POOLS = ("MaxPool", "AveragePool", "LpPool")
_FIRST_OPSET = 18  # Pad takes axes from here on


def _opset(model: Any) -> int:
    return next(int(item.version) for item in model.opset_import if item.domain in ("", "ai.onnx"))


def name_pad_axes(model: Any) -> int:
    """Apply the rule to an ``onnx.ModelProto`` in place and return the number of Pads changed."""
    from onnx import numpy_helper

    if _opset(model) < _FIRST_OPSET:
        return 0
    pooled = {node.input[0] for node in model.graph.node if node.op_type in _POOLS}
    sizes = {item.name: item.dims[0] for item in model.graph.initializer if len(item.dims) == 1}
    changed = 0
    for node in model.graph.node:
        if node.op_type != "Pad" or node.output[0] not in pooled or len(node.input) > 3 or node.input[1] not in sizes:
            continue
        rank = sizes[node.input[1]] // 2
        name = f"{node.name}_axes"
        node.input.extend([""] * (3 - len(node.input)) + [name])
        model.graph.initializer.append(_axes(numpy_helper, rank, name))
        changed += 1
    return changed


def _axes(numpy_helper: Any, rank: int, name: str) -> Any:
    import numpy

    return numpy_helper.from_array(numpy.arange(rank, dtype=numpy.int64), name)
