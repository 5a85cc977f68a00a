"""The second consolidation, between loading and inference: the branches fold into the layer that they stand beside.

Hao et al., arXiv 2305.00603: W = W₀ + Σ G_b P_b and b = b₀ + Σ β_b, with (G P)[o, a·c + i] = G[o, i·g + a], in fp64. It
is exact for every linear layer and plain 1×1 conv, and costs nothing at inference.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import nn

from cadapt.adapters.scheme import MergedLayer, Refusal
from cadapt.plan import Form
from cadapt.site import Site

_PLAIN_CONVS = (nn.Conv2d, Conv2dSame)


def merge_consolidator(site: Site, form: Form, adapter: nn.Module, layer: nn.Module | None) -> MergedLayer | Refusal:
    """Fold a trained Consolidator, in its training or its stored form, into the layer of its site, or say why not.

    Args:
        site: where the adapter stands.
        form: how it joins.
        adapter: the adapter module.
        layer: the base's module at the site's path.

    Returns:
        The layer's new weight and bias in fp64, or the refusal.
    """
    parts: Any = adapter
    matrix, bias = parts.summed()
    if isinstance(layer, nn.Linear):
        return _sum(layer, matrix, bias)
    if not isinstance(layer, nn.Conv2d):
        return Refusal(reason=f"what the {site.operator} computes is no linear layer that could take it up")
    if type(layer) not in _PLAIN_CONVS:
        return Refusal(reason=f"the weight of a {type(layer).__name__} is computed at run time, not a plain kernel")
    if layer.groups == 1:
        return _sum(layer, matrix, bias)
    return _merge_grouped(layer, matrix, bias)


def _merge_grouped(layer: nn.Conv2d, matrix: torch.Tensor, bias: torch.Tensor) -> MergedLayer | Refusal:
    """Fold into a conv of several groups, which has weights on its block diagonal only."""
    groups = layer.groups
    blocks = matrix.reshape(groups, layer.out_channels // groups, groups, layer.in_channels // groups).transpose(1, 2)
    own = torch.eye(groups, dtype=torch.bool, device=matrix.device)
    if bool(blocks[~own].any()):
        return Refusal(reason=f"the conv has {groups} groups; the sum would be dense, {groups} times its cost")
    return _sum(layer, blocks[own].flatten(0, 1), bias)


def _sum(layer: nn.Linear | nn.Conv2d, matrix: torch.Tensor, bias: torch.Tensor) -> MergedLayer:
    weight = layer.weight.detach().double()
    old = 0.0 if layer.bias is None else layer.bias.detach().double()
    return MergedLayer(weight=weight + matrix.reshape(weight.shape), bias=bias + old)
