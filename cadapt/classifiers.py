"""The classifiers of a timm model: the layers that give its logits, for which a task's head stands in.

Most models have one. Distilled ones average two, EfficientViM weighs one for each stage, and some hold theirs in a
module with norms or an MLP of its own, of which only the last layer is the classifier.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


def classifier_paths(model: nn.Module) -> tuple[str, ...]:
    """The paths of a timm model's classifiers, in its order; none where it says of none."""
    getter = getattr(model, "get_classifier", None)
    found = getter() if callable(getter) else None
    modules = tuple(found) if isinstance(found, tuple | list) else (found,)
    paths = {id(module): path for path, module in model.named_modules()}
    named = [paths[id(module)] for module in modules if isinstance(module, nn.Module) and id(module) in paths]
    if not named:
        recorded = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
        known = set(paths.values())
        named = [path for path in (recorded if isinstance(recorded, tuple | list) else (recorded,)) if path in known]
    return tuple(dict.fromkeys(layer for path in named for layer in _layers(model, path)))


def backbone_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's state without its classifiers."""
    state: dict[str, torch.Tensor] = model.state_dict()
    heads = tuple(f"{path}." for path in classifier_paths(model))
    return {name: tensor for name, tensor in state.items() if not name.startswith(heads)}


def _layers(model: nn.Module, path: str) -> Iterator[str]:
    """The layers of a classifier that give as many outputs as the model has classes; itself where it is one layer."""
    classes = getattr(model, "num_classes", None)
    layers = [
        ".".join(filter(None, (path, name)))
        for name, module in model.get_submodule(path).named_modules()
        if name and _width(module) == classes
    ]
    yield from layers or [path]


def _width(module: nn.Module) -> int | None:
    if isinstance(module, nn.Linear):
        return module.out_features
    return module.out_channels if isinstance(module, nn.Conv2d) else None
