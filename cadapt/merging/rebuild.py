"""Building a model again around changed layers: the base with some of its layers exchanged, and the adapters that stay.

Both kinds of merges end here, so that what they deliver is an ordinary adapted model, operated by its own plan.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from cadapt.adapted import ADAPTERS, AdaptedModel
from cadapt.backbone import Backbone
from cadapt.graph.sites import locate_sites
from cadapt.plan import Insertion
from cadapt.planning import Survey
from cadapt.surgery import adapter_path, operate


def bare_base(model: AdaptedModel) -> nn.Module:
    """A module that holds what the base holds, under the same names; the tensors are the model's own."""
    base = nn.Module()
    base._modules.update({name: child for name, child in model._modules.items() if name != ADAPTERS})
    base._parameters.update(model._parameters)
    base._buffers.update(model._buffers)
    base._non_persistent_buffers_set.update(model._non_persistent_buffers_set)
    return base.eval()


def survey_again(model: AdaptedModel, base: nn.Module) -> Survey:
    """The sites of an adapted model's base, in its own graph."""
    return Survey(graph=model.base_graph, located=locate_sites(model.base_graph, base))


def rebuild(
    model: AdaptedModel,
    base: nn.Module,
    surveyed: Survey,
    *,
    staying: Sequence[tuple[Insertion, nn.Module]],
    layers: Mapping[str, nn.Module],
) -> AdaptedModel:
    """Operate by the plan that is left, then give layers, adapters and head their values.

    Args:
        model: the adapted model, left as it is; its differences are taken to be in ``base`` already.
        base: what it holds of the base, left as it is.
        surveyed: its sites.
        staying: the adapters that stay, each with its entry in the plan, in the plan's order.
        layers: the layers that take the place of the base's, by path.

    Returns:
        The model, in eval mode.
    """
    plan = replace(model.plan, insertions=tuple(insertion for insertion, _ in staying), deltas=())
    backbone = Backbone(model=base, base=plan.base, preprocessing=model.preprocessing)
    built = operate(backbone, plan, surveyed)
    for path, layer in layers.items():
        built.set_submodule(path, copy.deepcopy(layer))
    for insertion, adapter in staying:
        built.get_submodule(adapter_path(insertion)).load_state_dict(adapter.state_dict())
    if plan.head is not None:
        path = f"{ADAPTERS}.head"
        built.get_submodule(path).load_state_dict(model.get_submodule(path).state_dict())
    built.classes = model.classes
    built.training_record = dict(model.training_record)
    return built.eval()


def pristine_in(model: AdaptedModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What a scheme tuned of the base, as it was: what a merged model is switched off to."""
    return {name: value.to(dtype) for name, value in model._pristine.items()}
