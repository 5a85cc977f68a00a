"""The merged model under timm's own keys: one checkpoint of base and task that needs cadapt no more.

Possible where no adapter stays. Where a layer is another than timm's, its keys say so, and timm's own loading fails
rather than compute something else; :func:`cadapt.merging.load_merged` reads such a file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import nn

from cadapt.adapted import ADAPTERS, AdaptedModel
from cadapt.errors import CadaptError
from cadapt.merging.plain import describe_plain, explain_difference, find_exchanged, find_unlike

# the key of a checkpoint's metadata under which its facts are
FACTS = "timm"
# what stands between the path of a layer that is not timm's and the names of its tensors
PLAIN = "plain"
_HEAD = f"{ADAPTERS}.head."


@dataclass(frozen=True, kw_only=True)
class _Contents:
    """The tensors by timm's keys and the layers that are not timm's, or the reason why there is no checkpoint."""

    reason: str | None = None
    tensors: Mapping[str, torch.Tensor]
    exchanged: Mapping[str, nn.Module]
    timm_model: nn.Module | None = None


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
        raise _none_of(model, reason)
    return dict(_contents(model).tensors)


def why_not_timm(model: AdaptedModel) -> str | None:
    """Why a model has no checkpoint that timm loads, in one sentence, or None where it has one."""
    contents = _contents(model)
    if contents.reason is not None or not contents.exchanged:
        return contents.reason
    assert contents.timm_model is not None
    path, layer = next(iter(contents.exchanged.items()))
    difference = explain_difference(layer, contents.timm_model.get_submodule(path))
    others = len(contents.exchanged) - 1
    more = f", and {others} other layer{'s differ' if others > 1 else ' differs'} likewise" if others else ""
    return f"its '{path}' is {difference}{more}"


def checkpoint_bytes(model: AdaptedModel, *, dtype: torch.dtype | None = None) -> bytes:
    """A merged model as one ``.safetensors`` file in timm's architecture.

    Metadata under ``timm`` says which architecture, classes and preprocessing it is for, and under ``plain`` which
    layers are not timm's. Without such layers timm loads it strictly; with them timm finds other keys than its own, and
    :func:`cadapt.merging.load_merged` loads it.

    Args:
        model: a merged model, or one into which nothing was inserted.
        dtype: of the file's floating tensors; None is the model's own.

    Raises:
        CadaptError: adapters are left that timm has no place for, with the reason, or a value overflows in ``dtype``.
    """
    contents = _contents(model)
    if contents.reason is not None:
        raise _none_of(model, contents.reason)
    tensors = {name: _rounded(name, tensor, dtype) for name, tensor in contents.tensors.items()}
    renamed = {_file_key(name, contents.exchanged): tensor for name, tensor in tensors.items()}
    return save(renamed, {"format": "pt", FACTS: json.dumps(_facts(model, contents.exchanged))})


def checkpoint_facts(model: AdaptedModel) -> dict[str, Any]:
    """What a checkpoint's metadata says, as a JSON object; ``plain`` holds the layers that are not timm's, by path."""
    return _facts(model, _contents(model).exchanged)


def _facts(model: AdaptedModel, exchanged: Mapping[str, nn.Module]) -> dict[str, Any]:
    head = model.plan.head
    return {
        "architecture": model.plan.base.name.partition(".")[0],
        "num_classes": len(model.classes) if head is None else head.num_classes,
        "classes": list(model.classes),
        "preprocessing": model.preprocessing.to_json(),
        "settings": dict(model.plan.base.settings),
        PLAIN: {path: describe_plain(layer).to_json() for path, layer in exchanged.items()},
    }


def _none_of(model: AdaptedModel, reason: str) -> CadaptError:
    return CadaptError(
        f"no timm checkpoint of {model.plan.base.name} with {model.plan.scheme}: {reason}",
        hint="cadapt export --onnx holds any adapted model, cadapt export its adapter",
    )


def _contents(model: AdaptedModel) -> _Contents:
    """What a checkpoint of a model would hold."""
    left = len(model.plan.insertions)
    architecture = model.plan.base.name.partition(".")[0]
    reason = None
    if left:
        reason = f"{left} adapter{'s' if left > 1 else ''} did not fold into the base, and timm has no place for them"
    elif model.plan.head is not None and model.plan.head.norm:
        reason = "the head has a norm before its classifier, which the timm model has not"
    elif not timm.is_model(architecture):
        reason = f"timm has no architecture named '{architecture}'"
    if reason is not None:
        return _Contents(reason=reason, tensors={}, exchanged={})
    theirs = _make_timm(model, architecture)
    tensors = _renamed(model)
    heads = model.plan.head.paths if model.plan.head is not None else ()
    exchanged = {path: layer for path, layer in find_exchanged(model, theirs).items() if path not in heads}
    reason = _difference(tensors, theirs.state_dict(), exchanged) or find_unlike(model, theirs, heads)
    return _Contents(reason=reason, tensors=tensors, exchanged=exchanged, timm_model=theirs)


def _make_timm(model: AdaptedModel, architecture: str) -> nn.Module:
    """The architecture with the task's number of classes, without data."""
    arguments = dict(model.plan.base.settings)
    if model.plan.head is not None:
        arguments["num_classes"] = model.plan.head.num_classes
    with torch.device("meta"):
        fresh: nn.Module = timm.create_model(architecture, pretrained=False, **arguments)
    return fresh


def _difference(
    ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], exchanged: Iterable[str]
) -> str | None:
    """What the two do not have in common, the layers that were exchanged left out."""
    skipped = tuple(f"{path}." for path in exchanged)
    mine, own = ({key: state[key] for key in state if not key.startswith(skipped)} for state in (ours, theirs))
    for key in sorted(mine.keys() - own.keys()):
        return f"it has '{key}', which the timm model has not"
    for key in sorted(own.keys() - mine.keys()):
        return f"it lacks '{key}', which the timm model has"
    for key, tensor in mine.items():
        if tensor.shape != own[key].shape:
            return f"its '{key}' has shape {tuple(tensor.shape)}, the timm model's {tuple(own[key].shape)}"
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


def _file_key(name: str, exchanged: Mapping[str, nn.Module]) -> str:
    path, _, leaf = name.rpartition(".")
    return f"{path}.{PLAIN}.{leaf}" if path in exchanged else name


def _rounded(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A tensor for the file: of its own memory, since tied tensors share theirs, which safetensors refuses."""
    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    rounded = tensor.detach().cpu().to(wanted)
    if not bool(torch.isfinite(rounded).all()) and bool(torch.isfinite(tensor).all()):
        short = str(wanted).removeprefix("torch.")
        raise CadaptError(f"'{name}' does not fit into {short}: it would overflow", hint="--dtype bf16")
    return rounded.contiguous().clone()
