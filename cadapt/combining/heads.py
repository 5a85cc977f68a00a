"""The tasks' classifiers as one: their rows stacked where the classes differ, their mean where they are the same.

A file has one head. What stands before its classifier (a norm, a dropout) can be only one task's, so that heads which
differ there cannot be joined.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from cadapt.adapted import ADAPTERS, AdaptedModel
from cadapt.adapters import Refusal
from cadapt.plan import Head

HEAD = f"{ADAPTERS}.head"
_CLASSIFIER = ("classifier.weight", "classifier.bias")


@dataclass(frozen=True, kw_only=True, eq=False)
class JoinedHead:
    """One head for all tasks.

    ``head`` is its entry in the plan, ``state`` its tensors, in fp64. ``places`` gives for each task the row of each of
    its classes; ``matrix`` maps the tasks' own logits side by side, ``[B, Σ C_i]``, to the joined ones.
    """

    head: Head
    classes: tuple[str, ...]
    averaged: bool
    state: Mapping[str, torch.Tensor]
    places: tuple[tuple[int, ...], ...]
    matrix: torch.Tensor


def join_heads(tasks: Mapping[str, AdaptedModel], weights: Sequence[float]) -> JoinedHead | Refusal:
    """Join the heads of trained models on one base.

    Args:
        tasks: the models by name; where two know a class of one name, theirs are called ``task/name``.
        weights: each task's share of a mean, see :func:`cadapt.combining.settings.shares`.
    """
    models = list(tasks.values())
    reason = _why_not(tasks)
    if reason is not None:
        return Refusal(reason=reason)
    averaged = len({frozenset(model.classes) for model in models}) == 1
    classes = models[0].classes if averaged else _union(tasks)
    places = _places(models, classes, averaged)
    matrix = torch.zeros(len(classes), sum(map(len, places)), dtype=torch.float64)
    start = 0
    for rows, weight in zip(places, weights, strict=True):
        for column, row in enumerate(rows, start=start):
            matrix[row, column] = weight if averaged else 1.0
        start += len(rows)
    first = models[0].plan.head
    assert first is not None
    return JoinedHead(
        head=replace(first, num_classes=len(classes), init="new"),
        classes=classes,
        averaged=averaged,
        state=_state(models, matrix),
        places=places,
        matrix=matrix,
    )


def _places(models: Sequence[AdaptedModel], classes: Sequence[str], averaged: bool) -> tuple[tuple[int, ...], ...]:
    if averaged:
        index = {name: row for row, name in enumerate(classes)}
        return tuple(tuple(index[name] for name in model.classes) for model in models)
    starts = [sum(len(model.classes) for model in models[:number]) for number in range(len(models))]
    return tuple(tuple(range(start, start + len(model.classes))) for start, model in zip(starts, models, strict=True))


def _union(tasks: Mapping[str, AdaptedModel]) -> tuple[str, ...]:
    """All classes; a name that several tasks have is told apart by the task's."""
    counts = Counter(name for model in tasks.values() for name in model.classes)
    return tuple(
        f"{task}/{name}" if counts[name] > 1 else name for task, model in tasks.items() for name in model.classes
    )


def _why_not(tasks: Mapping[str, AdaptedModel]) -> str | None:
    """Why heads cannot be one, in a sentence."""
    states = {name: _head_state(model) for name, model in tasks.items()}
    (first_name, first), *others = ((name, model.plan.head) for name, model in tasks.items())
    for name, head in [(first_name, first), *others]:
        if head is None or first is None:
            return f"'{name}' has no head of its own"
        if not _is_plain(tasks[name], states[name]):
            return f"the classifier of '{name}' is no plain linear layer or 1×1 conv, whose rows could be stacked"
        if (head.norm, head.dropout) != (first.norm, first.dropout):
            return (
                f"the heads differ before their classifiers: '{first_name}' has {_before(first)}, "
                f"'{name}' has {_before(head)}"
            )
        for key, value in states[name].items():
            if not key.endswith(_CLASSIFIER) and not torch.equal(value, states[first_name][key]):
                return f"the heads have norms that were trained apart ('{key}'), and a file has one"
    return None


def _before(head: Head) -> str:
    return f"{'a norm' if head.norm else 'no norm'} and a dropout of {head.dropout:g}"


def _is_plain(model: AdaptedModel, state: Mapping[str, torch.Tensor]) -> bool:
    head = model.get_submodule(HEAD)
    last = [module for name, module in head.named_modules() if name.rpartition(".")[2] == "classifier"]
    known = all(key.endswith(_CLASSIFIER) or "norm." in key for key in state)
    return bool(last) and known and all(_has_rows(module) for module in last)


def _has_rows(module: nn.Module) -> bool:
    """Whether a classifier is a row of weights for each class, and not a kind that computes otherwise."""
    return type(module) is nn.Linear or (type(module) is nn.Conv2d and module.kernel_size == (1, 1))


def _head_state(model: AdaptedModel) -> dict[str, torch.Tensor]:
    if model.plan.head is None:
        return {}
    return {name: value.detach().cpu().double() for name, value in model.get_submodule(HEAD).state_dict().items()}


def _state(models: Sequence[AdaptedModel], matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    """The joined head's tensors: each classifier's rows are mixed by the matrix, all else is the first task's."""
    states = [_head_state(model) for model in models]
    joined = {key: value for key, value in states[0].items() if not key.endswith(_CLASSIFIER)}
    for key in [key for key in states[0] if key.endswith("classifier.weight")]:
        bias = f"{key.removesuffix('weight')}bias"
        rows = torch.cat([state[key] for state in states])
        offsets = [state.get(bias, torch.zeros(len(state[key]), dtype=torch.float64)) for state in states]
        joined[key] = torch.tensordot(matrix, rows, dims=1)
        joined[bias] = matrix @ torch.cat(offsets)
    return joined


class SideBySide(nn.Module):
    """Several tasks' heads on the same features: their logits ``[B, Σ C_i]``, one task's behind the other's."""

    def __init__(self, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return the logits of all heads, joined on the dimension of classes."""
        return torch.cat([head(features) for head in self.heads], dim=1)
