"""Learned differences to the base's own tensors (bias and norm tuning): the base takes them up by plain addition.

Nothing is refused here, since it is exact for every tensor. Only where a bias is new, which a batch norm behind it may
take up, can the base become another architecture.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from cadapt.adapted import ADAPTERS, AdaptedModel


@torch.no_grad()
def absorb_deltas(base: nn.Module, adapted: AdaptedModel) -> nn.Module:
    """A copy of the base with the task's differences added to its tensors, and with the biases that are new.

    Args:
        base: what the adapted model holds of the base; it is returned as it is where there are no differences.
        adapted: the model with the differences, of the same dtype.
    """
    if not adapted.plan.deltas:
        return base
    changed = copy.deepcopy(base)
    for name in adapted.plan.deltas:
        owner, _, leaf = name.rpartition(".")
        delta = _delta(adapted, name).detach()
        layer = changed.get_submodule(owner)
        own = getattr(layer, leaf)
        if own is None and not bool(delta.any()):
            continue  # an untrained bias that the layer had not
        total = delta.clone() if own is None else own + delta
        setattr(layer, leaf, nn.Parameter(total, requires_grad=False))
    return changed


def new_biases(base: nn.Module, deltas: Sequence[str]) -> tuple[str, ...]:
    """The paths of the layers to which a difference gives a bias that they have not."""
    paths = (name.removesuffix(".bias") for name in deltas if name.endswith(".bias"))
    return tuple(path for path in paths if bias_of(base, path) is None)


def bias_of(model: nn.Module, path: str) -> torch.Tensor | None:
    """A layer's bias, or None where it has none."""
    value = getattr(model.get_submodule(path), "bias", None)
    return value if isinstance(value, torch.Tensor) else None


@contextmanager
def without_deltas(adapted: AdaptedModel) -> Iterator[None]:
    """Inside, a model's differences are zero; it is for one caller at a time."""
    deltas = [_delta(adapted, name) for name in adapted.plan.deltas]
    values = [delta.detach().clone() for delta in deltas]
    try:
        for delta in deltas:
            delta.detach().zero_()
        yield
    finally:
        for delta, value in zip(deltas, values, strict=True):
            delta.detach().copy_(value)


def describe_deltas(count: int, new: Sequence[str], merged: nn.Module) -> str:
    """What became of ``count`` differences, ``new`` of them biases of layers without one, as one clause."""
    kept = sum(bias_of(merged, path) is not None for path in new)
    clauses = [f"{count} of the base's tensors take their differences up exactly"]
    if len(new) > kept:
        clauses.append(f"{len(new) - kept} of them new biases that went into batch norms")
    if kept:
        clauses.append(f"{kept} of them biases that the base had not")
    return ", ".join(clauses)


def _delta(adapted: AdaptedModel, name: str) -> nn.Parameter:
    return adapted.get_parameter(f"{ADAPTERS}.delta.{name.replace('.', '__')}")
