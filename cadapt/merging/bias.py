"""A merged convolution may have a bias where the base's had none; a batch norm behind it can take that bias up.

BN((W x + b)) with mean μ is BN(W x) with mean μ − b, exactly, so the architecture and its state_dict keys stay timm's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn


@torch.no_grad()
def move_biases(model: nn.Module, graph: fx.Graph, paths: Iterable[str]) -> dict[str, str]:
    """Move new biases of convolutions into the batch norms behind them, in place, where they can go.

    Args:
        model: the merged model.
        graph: the graph that it runs.
        paths: convolutions that have a bias and had none in the base.

    Returns:
        For each path a sentence on where its bias is now.
    """
    notes: dict[str, str] = {}
    for path in paths:
        norm_path = _sole_batch_norm(model, graph, path)
        if norm_path is None:
            notes[path] = "the layer has a bias now, which the base's had not: no batch norm follows it alone"
            continue
        conv: Any = model.get_submodule(path)
        norm: Any = model.get_submodule(norm_path)
        norm.running_mean.sub_(conv.bias.to(norm.running_mean.dtype))
        conv.bias = None
        notes[path] = f"its bias went into the running mean of '{norm_path}'"
    return notes


def _sole_batch_norm(model: nn.Module, graph: fx.Graph, path: str) -> str | None:
    """The path of the batch norm that is the only reader of a layer's output and reads nothing else."""
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target == path]
    readers = {reader for node in calls for reader in node.users}
    if len(calls) != 1 or len(readers) != 1:
        return None
    reader = readers.pop()
    if reader.op != "call_module":
        return None
    norm = model.get_submodule(str(reader.target))
    if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None:
        return None
    modules = dict(model.named_modules(remove_duplicate=False))
    uses = sum(node.op == "call_module" and modules[str(node.target)] is norm for node in graph.nodes)
    return str(reader.target) if uses == 1 else None
