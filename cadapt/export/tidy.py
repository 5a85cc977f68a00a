"""Leave in the ONNX file what its reader needs and nothing of the machine it was made on.

The exporter notes stack traces, with local paths, at every node. They go; class names, preprocessing and the base's
name come, so that the file can be used without anything beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PRODUCER = "cadapt"


def _strip(item: Any) -> None:
    """Empty the notes of one protobuf message that may carry some."""
    for field in ("doc_string", "metadata_props"):
        if field in item.DESCRIPTOR.fields_by_name:
            item.ClearField(field)


def _strip_graph(graph: Any) -> None:
    _strip(graph)
    for values in (graph.node, graph.input, graph.output, graph.value_info, graph.initializer):
        for item in values:
            _strip(item)
    _strip_attributes(graph.node)


def _strip_attributes(nodes: Any) -> None:
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        _strip(attribute)
        for graph in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
            _strip_graph(graph)


def tidy(model: Any, *, name: str, version: str, metadata: Mapping[str, str]) -> None:
    """Strip the notes of an ``onnx.ModelProto`` in place and set its name, producer and metadata.

    Args:
        model: the exporter's result.
        name: the graph's name.
        version: of cadapt.
        metadata: text by key, written in the order given.
    """
    _strip(model)
    _strip_graph(model.graph)
    for function in model.functions:
        _strip(function)
        for item in (*function.node, *function.value_info):
            _strip(item)
        _strip_attributes(function.node)
    model.graph.name = name
    model.producer_name, model.producer_version = PRODUCER, version
    for key, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
