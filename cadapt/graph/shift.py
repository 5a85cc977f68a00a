"""Learned differences to a base's own tensors, added where the graph reads them: the base keeps its values.

A layer that is called with a difference is the same layer, given the sum of its tensor and the difference for this one
call. A convolution without a bias has a zero one for that purpose.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.func import functional_call


class Readers:
    """Which of a model's tensors a graph reads, and by which nodes.

    ``names`` gives the shape of each and a tensor of the dtype and device it is to have: parameters of called modules,
    parameters the graph reads itself, and the biases that called convolutions lack.
    """

    def __init__(self, graph: fx.Graph, model: nn.Module) -> None:
        self.graph = graph
        self.names: dict[str, tuple[tuple[int, ...], torch.Tensor]] = {}
        self._calls: defaultdict[str, list[fx.Node]] = defaultdict(list)
        self._reads: defaultdict[str, list[fx.Node]] = defaultdict(list)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for node in graph.nodes:
            if node.op == "get_attr" and node.target in parameters:
                self._reads[str(node.target)].append(node)
                self._note(str(node.target), parameters[str(node.target)])
            elif node.op == "call_module" and not _is_new(str(node.target), model):
                self._calls[str(node.target)].append(node)
                for name, tensor in tensors_of(model.get_submodule(str(node.target))).items():
                    self._note(f"{node.target}.{name}", tensor)

    def _note(self, name: str, like: torch.Tensor) -> None:
        self.names[name] = tuple(like.shape), like

    def shift(self, targets: Mapping[str, str]) -> None:
        """Add a parameter to each of some tensors wherever it is read.

        Args:
            targets: for a tensor's name the path, from the root, of what is added to it.
        """
        for name, nodes in self._reads.items():
            if name in targets:
                for node in nodes:
                    self._shift_read(node, targets[name])
        for path, nodes in self._calls.items():
            inside = {name.removeprefix(f"{path}."): at for name, at in targets.items() if name.startswith(f"{path}.")}
            for node in nodes if inside else ():
                self._shift_call(node, inside)

    def _shift_read(self, node: fx.Node, target: str) -> None:
        with self.graph.inserting_after(node):
            delta = self.graph.get_attr(target)
        with self.graph.inserting_after(delta):
            total = self.graph.call_function(torch.add, (node, delta))
        node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)

    def _shift_call(self, node: fx.Node, inside: Mapping[str, str]) -> None:
        path, arguments, options = str(node.target), node.args, node.kwargs
        with self.graph.inserting_before(node):
            module = self.graph.get_attr(path)
            deltas = {name: self.graph.get_attr(at) for name, at in inside.items()}
            call = self.graph.call_function(call_shifted, (module, deltas, *arguments), dict(options))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        self.graph.erase_node(node)


def _is_new(path: str, model: nn.Module) -> bool:
    """Whether a graph calls what the base does not have: an adapter or a head."""
    try:
        model.get_submodule(path)
    except AttributeError:
        return True
    return False


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's parameters by name, with a stand-in for each bias that a convolution inside lacks."""
    found: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    for path, child in module.named_modules():
        if isinstance(child, nn.Conv2d) and child.bias is None:
            weight = child.weight
            stand_in = torch.empty(child.out_channels, dtype=weight.dtype, device=weight.device)
            found[f"{path}.bias".removeprefix(".")] = stand_in
    return found


def call_shifted(module: nn.Module, deltas: Mapping[str, torch.Tensor], *arguments: Any, **options: Any) -> Any:
    """Call a module with differences added to its tensors for this call; a tensor it lacks is taken to be zero."""
    shifted = {}
    for name, delta in deltas.items():
        own = _get(module, name)
        shifted[name] = delta if own is None else own + delta
    return functional_call(module, shifted, arguments, options, tie_weights=False)


def _get(module: nn.Module, name: str) -> torch.Tensor | None:
    owner, _, leaf = name.rpartition(".")
    found: torch.Tensor | None = getattr(module.get_submodule(owner), leaf)
    return found
