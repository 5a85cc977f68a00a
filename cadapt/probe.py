"""What a backbone computes from one fixed picture: tells models with the same tensors but other settings apart.

A pooling or an activation has no tensors, so a digest of the weights cannot see it. A few means of the features, to a
tolerance that rounding on any machine stays within, can.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

_VALUES = 8
_TOLERANCE = 0.02


def probe(model: nn.Module, input_size: Sequence[int]) -> tuple[float, ...]:
    """Means of a timm model's features, before its classifier, for a fixed wave pattern.

    Args:
        model: the model in eval mode; its classifier is not run.
        input_size: channels, height and width.

    Returns:
        Eight values; none for a model without data, without timm's feature methods, that
        does not run at this size, or with infinite features.
    """
    extract: Any = getattr(model, "forward_features", None)
    pool: Any = getattr(model, "forward_head", None)
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.is_meta or extract is None or pool is None:
        return ()
    if "pre_logits" not in inspect.signature(pool).parameters:
        return ()
    count = int(torch.tensor(tuple(input_size)).prod())
    wave = torch.sin(torch.arange(count, dtype=torch.float64) * 0.37).reshape(1, *input_size)
    try:
        with torch.no_grad():
            features = pool(extract(wave.to(parameter.device, parameter.dtype)), pre_logits=True)
    except (RuntimeError, AssertionError):
        # a size the model does not take: tracing it comes next, and says so at the layer where it fails
        return ()
    means = [float(part.mean()) for part in features.flatten().double().cpu().tensor_split(_VALUES) if part.numel()]
    return tuple(means) if bool(torch.isfinite(torch.tensor(means)).all()) else ()


def agree(found: Sequence[float], expected: Sequence[float]) -> bool:
    """Whether two probes are of the same computation; one that could not be taken agrees with any."""
    if not found or not expected:
        return True
    scale = max(abs(value) for value in expected)
    pairs = zip(found, expected, strict=False)
    return len(found) == len(expected) and all(abs(ours - theirs) <= _TOLERANCE * scale for ours, theirs in pairs)
