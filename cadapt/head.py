"""The task's classifier: stands where the base's would, which stays beside it untouched."""

from __future__ import annotations

import copy
from collections import OrderedDict

from timm.layers import LayerNorm2d
from torch import nn

from cadapt.plan import Head


def build_head(classifier: nn.Module, head: Head, *, shape: tuple[int, ...]) -> nn.Module:
    """Make a head that can be called where ``classifier`` is.

    Args:
        classifier: the base's own, copied where the head starts from it; a model without classes has an identity.
        head: classes, initialisation, and what stands before the classifier.
        shape: of what the base's is given, without the batch: features ``(C,)``, an attention pool's tokens
            ``(L, C)``, pooled maps ``(C, 1, 1)``, or, where nothing was pooled, maps ``(C, H, W)``, which are then
            averaged.

    Returns:
        Maps what the base's classifier is given to ``[B, num_classes]`` (or ``[B, num_classes, 1, 1]`` for a conv).
    """
    maps = len(shape) == 3 and not isinstance(classifier, nn.Linear)
    unpooled = maps and max(shape[1:]) > 1 and not isinstance(classifier, nn.Conv2d)
    on_maps = maps and not unpooled
    features = shape[0] if maps else shape[-1]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if unpooled:
        layers["pool"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
    if head.norm:
        layers["norm"] = LayerNorm2d(features) if on_maps else nn.LayerNorm(features)
    if head.dropout > 0:
        layers["dropout"] = nn.Dropout(head.dropout)
    layers["classifier"] = _classifier(classifier, head, features, on_maps)
    return nn.Sequential(layers)


def _classifier(classifier: nn.Module, head: Head, features: int, on_maps: bool) -> nn.Module:
    if head.init == "base":
        return copy.deepcopy(classifier)
    fresh = nn.Conv2d(features, head.num_classes, 1) if on_maps else nn.Linear(features, head.num_classes)
    nn.init.trunc_normal_(fresh.weight, std=0.02)
    assert fresh.bias is not None
    nn.init.zeros_(fresh.bias)
    return fresh
