"""The merged model under timm's own keys: one checkpoint of base and task that needs cadapt no more.

Possible where no adapter stays and no layer changed its shape; whether the keys are timm's is asked of timm itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import timm
import torch
from torch import nn

from cadapt.adapted import ADAPTERS, AdaptedModel
from cadapt.errors import CadaptError

_HEAD = f"{ADAPTERS}.head."


def timm_state_dict(model: AdaptedModel) -> dict[str, torch.Tensor]:
    """Return a state_dict that ``timm.create_model(name, num_classes=N)`` loads strictly.

    Args:
        model: a merged model, or one into which nothing was inserted. The task's head stands under the path of the
            base's classifier. The tensors are the model's own, not copies.

    Raises:
        CadaptError: it is not that architecture any more, with the reason.
    """
    reason = why_not_timm(model)
    if reason is not None:
        raise CadaptError(
            f"no timm checkpoint of {model.plan.base.name} with {model.plan.scheme}: {reason}",
            hint="cadapt export --onnx holds any adapted model, cadapt export its adapter",
        )
    return _renamed(model)


def why_not_timm(model: AdaptedModel) -> str | None:
    """Why a model has no timm checkpoint, in one sentence, or None where it has one."""
    left = len(model.plan.insertions)
    if left:
        return f"{left} adapter{'s' if left > 1 else ''} did not fold into the base, and timm has no place for them"
    if model.plan.head is not None and model.plan.head.norm:
        return "the head has a norm before its classifier, which the timm model has not"
    architecture = model.plan.base.name.partition(".")[0]
    if not timm.is_model(architecture):
        return f"timm has no architecture named '{architecture}'"
    return _difference(_renamed(model), _timm_state(model, architecture))


def _timm_state(model: AdaptedModel, architecture: str) -> Mapping[str, torch.Tensor]:
    arguments = dict(model.plan.base.settings)
    if model.plan.head is not None:
        arguments["num_classes"] = model.plan.head.num_classes
    with torch.device("meta"):
        fresh: nn.Module = timm.create_model(architecture, pretrained=False, **arguments)
    state: Mapping[str, torch.Tensor] = fresh.state_dict()
    return state


def _difference(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> str | None:
    for key in sorted(ours.keys() - theirs.keys()):
        return f"it has '{key}', which the timm model has not"
    for key in sorted(theirs.keys() - ours.keys()):
        return f"it lacks '{key}', which the timm model has"
    for key, tensor in ours.items():
        if tensor.shape != theirs[key].shape:
            return f"its '{key}' has shape {tuple(tensor.shape)}, the timm model's {tuple(theirs[key].shape)}"
    return None


def _renamed(model: AdaptedModel) -> dict[str, torch.Tensor]:
    """The base's tensors and the head's, the head under the classifier's path."""
    state: Mapping[str, torch.Tensor] = model.state_dict()
    paths = model.plan.head.paths if model.plan.head is not None else ()
    taken = tuple(f"{path}." for path in paths)
    renamed = {
        key: tensor
        for key, tensor in state.items()
        if not key.startswith(f"{ADAPTERS}.") and not (taken and key.startswith(taken))
    }
    for index, path in enumerate(taken):
        ours = f"{_HEAD}{index}." if len(taken) > 1 else _HEAD
        for key, tensor in state.items():
            if key.startswith(ours):
                renamed[path + key.removeprefix(ours).removeprefix("classifier.")] = tensor
    return renamed
