"""The model that is being folded, in fp32: stand-ins are put in and taken out again, adapters muted and heard again."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from cadapt.adapted import AdaptedModel
from cadapt.graph.operators import shape_of
from cadapt.graph.standardised import bake_layer
from cadapt.graph.trace import record_shapes
from cadapt.merging.fitted.hosts import Joint, find_joints
from cadapt.merging.fitted.stand_in import Change


class Muted(nn.Module):
    """Stands where an adapter stood and gives nothing: a zero that broadcasts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a scalar zero of x's dtype."""
        return x.new_zeros(())


@dataclass(frozen=True, kw_only=True)
class Fold:
    """One adapter gone: which of the joints, how, and what its hosts took up for it."""

    index: int
    action: Literal["fitted", "dropped"]
    changes: Mapping[str, Change]


class Workbench:
    """A private copy of a model in fp32, with its joints."""

    def __init__(self, model: AdaptedModel, *, computed: bool) -> None:
        self.model = copy.deepcopy(model).float().eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        record_shapes(self.model.graph, self.model, self.model.preprocessing.input_size)
        self.joints: tuple[Joint, ...] = find_joints(self.model, computed=computed)
        # the input's shape of each layer that had to be made plain to be a host
        self.computed: dict[str, torch.Size] = {}
        for host in (host for joint in self.joints for host in joint.hosts):
            layer: nn.Module = host.node.meta["host"]
            if layer is not self.model.get_submodule(host.path):
                self.computed[host.path] = torch.Size(shape_of(host.node.all_input_nodes[0]) or ())
                self.model.set_submodule(host.path, layer)

    def plain_of(self, model: AdaptedModel, path: str) -> nn.Module:
        """A host as a plain layer, from a model whose weights nobody changed."""
        layer = model.get_submodule(path)
        if path not in self.computed:
            return layer
        baked = bake_layer(layer, self.computed[path])
        assert isinstance(baked, nn.Module), path
        return baked

    @torch.no_grad()
    def apply(self, fold: Fold) -> None:
        """Mute the adapter and change its hosts, for good."""
        self.model.set_submodule(self.joints[fold.index].path, Muted())
        for path, change in fold.changes.items():
            add_change(self.model.get_submodule(path), change)

    @contextmanager
    def applied(self, fold: Fold) -> Iterator[None]:
        """Inside, a fold is applied; afterwards all is as it was, to the bit."""
        path = self.joints[fold.index].path
        adapter = self.model.get_submodule(path)
        layers: dict[str, Any] = {path: self.model.get_submodule(path) for path in fold.changes}
        tensors = {path: (layer.weight, layer.bias) for path, layer in layers.items()}
        for layer in layers.values():
            layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
            if layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        self.apply(fold)
        try:
            yield
        finally:
            self.model.set_submodule(path, adapter)
            for path, (weight, bias) in tensors.items():
                layers[path].weight, layers[path].bias = weight, bias


@torch.no_grad()
def add_change(layer: Any, change: Change) -> None:
    """Add to a layer's weight and bias, in place; a bias that it lacks is made where it is not zero throughout."""
    layer.weight.add_(change.weight.to(layer.weight.dtype))
    if layer.bias is None and bool(change.bias.any()):
        layer.bias = nn.Parameter(torch.zeros_like(change.bias, dtype=layer.weight.dtype), requires_grad=False)
    if layer.bias is not None:
        layer.bias.add_(change.bias.to(layer.bias.dtype))


def total_changes(folds: Sequence[Fold]) -> dict[str, Change]:
    """What all of some folds add to each layer."""
    total: dict[str, Change] = {}
    for fold in folds:
        for path, change in fold.changes.items():
            before = total.get(path)
            total[path] = (
                change
                if before is None
                else Change(weight=before.weight + change.weight, bias=before.bias + change.bias)
            )
    return total
