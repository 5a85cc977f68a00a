"""A graph as a flat record and back, and as a function.

torch.fx pickles nodes by following them, and a deep model has too many for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn


@dataclass(frozen=True)
class _Reference:
    """A node of the same record, by its place."""

    index: int


def flatten(graph: fx.Graph) -> list[dict[str, Any]]:
    """Return a graph's nodes in order, each a record that pickles by itself, what was noted of it included."""
    places = {node: _Reference(index) for index, node in enumerate(graph.nodes)}

    def refer(value: Any) -> Any:
        return _replace(value, places)

    return [
        {
            "op": node.op,
            "target": node.target,
            "args": refer(node.args),
            "kwargs": refer(node.kwargs),
            "name": node.name,
            "type": node.type,
            "meta": dict(node.meta),
        }
        for node in graph.nodes
    ]


def unflatten(records: list[dict[str, Any]]) -> fx.Graph:
    """Build the graph that :func:`flatten` was given."""
    graph = fx.Graph()
    nodes: dict[_Reference, fx.Node] = {}
    for index, record in enumerate(records):
        args, kwargs = _replace(record["args"], nodes), _replace(record["kwargs"], nodes)
        node = graph.create_node(
            record["op"], record["target"], args, kwargs, name=record["name"], type_expr=record["type"]
        )
        node.meta = record["meta"]
        nodes[_Reference(index)] = node
    return graph


def _replace(value: Any, known: Any) -> Any:
    """A node's arguments with nodes for references, or references for nodes, at any depth."""
    if isinstance(value, fx.Node | _Reference):
        return known[value]
    if isinstance(value, slice):
        return slice(*(_replace(item, known) for item in (value.start, value.stop, value.step)))
    if isinstance(value, dict):
        return {key: _replace(item, known) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace(item, known) for item in value]
    if isinstance(value, tuple):
        items = [_replace(item, known) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def compile_graph(model: nn.Module, graph: fx.Graph) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    """Return the Python function that a graph stands for, taking the module that holds its targets."""
    graph.lint()
    function: Any = type(fx.GraphModule(model, graph)).forward
    graph.owning_module = None
    compiled: Callable[[nn.Module, torch.Tensor], torch.Tensor] = function
    return compiled
