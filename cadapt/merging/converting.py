"""Weight-standardised convolutions in a merge: as plain ones, and back to their own kind where that can be solved.

What such a layer convolves with is no stored kernel, so that nothing can be added to it. The plain convolution of the
same arithmetic takes adapters up as any other does. Where the merged kernel is one that the layer itself can compute
(its rows have no mean, and it has gains to scale them, or they are small enough), the layer keeps its kind.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import nn

from cadapt.adapters import MergedLayer
from cadapt.graph.standardised import bake_layer, may_compute_weight
from cadapt.site import Site

_STANDARDISED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)
# a mean of a row below this share of its deviation is rounding
_ROUNDING = 1e-13
# a row may shrink to this share of its deviation: below it the ε of the standardising, and rounding, would rule it
_LEAST_SHARE = 0.1


def plain_form(site: Site, layer: nn.Module) -> nn.Module | str:
    """The layer itself where it convolves with its weight as stored, else the plain convolution that computes the same.

    Args:
        site: where an adapter stands, for the size of what the layer reads.
        layer: the base's layer, in eval mode; it is left as it is.

    Returns:
        The layer, or the reason why no plain one computes the same.
    """
    if not isinstance(layer, nn.Conv2d) or type(layer) is Conv2dSame or not may_compute_weight(layer):
        return layer
    baked = bake_layer(layer, torch.Size((1, *site.in_shape)))
    if baked is None:
        return layer
    if isinstance(baked, str):
        return f"no plain conv computes what the {type(layer).__name__} does: {baked}"
    return baked.requires_grad_(any(parameter.requires_grad for parameter in layer.parameters()))


@torch.no_grad()
def restandardise(layer: nn.Module, merged: MergedLayer) -> nn.Module | None:
    """A layer of the weight-standardised one's own kind that convolves with a merged kernel, or None where none does.

    The layer computes g · s · (W − mean) / √(var + ε) row by row. For a row k without a mean, W is k scaled to the old
    row's variance v, and the gain is g = √(var k · (v + ε) / v) / s. Without a gain, v is what the kernel leaves to
    solve for: v / (v + ε) = var k, which has a solution for var k below 1. That solution is so small for all but the
    var k next to 1 that it is none in half precision: a row that would shrink to less than a tenth is given up.

    Args:
        layer: the base's layer.
        merged: the kernel it is to convolve with, in the layer's groups.

    Returns:
        A copy with another weight, gain and bias. What it computes is still to be checked.
    """
    if type(layer) not in _STANDARDISED or merged.groups not in (None, getattr(layer, "groups", 1)):
        return None
    solved: Any = copy.deepcopy(layer)
    rows = merged.weight.flatten(1)
    variance = rows.var(dim=1, unbiased=False)
    if bool((rows.mean(dim=1).abs() > _ROUNDING * variance.sqrt()).any()):
        return None
    if isinstance(layer, ScaledStdConv2d | ScaledStdConv2dSame):
        own = solved.weight.flatten(1).var(dim=1, unbiased=False)
        gain = (variance * (own + solved.eps) / own).sqrt() / solved.scale
        solved.gain.copy_(gain.reshape(solved.gain.shape))
    else:
        if bool((variance >= 1).any()):
            return None
        before = solved.weight.flatten(1).var(dim=1, unbiased=False)
        own = variance * solved.eps / (1 - variance)
        if bool(((variance > 0) & (own < _LEAST_SHARE**2 * before)).any()):
            return None
    # a row of zeros stays one
    scale = torch.where(variance > 0, (own / variance.clamp(min=torch.finfo(variance.dtype).tiny)).sqrt(), 0.0)
    solved.weight.copy_((rows * scale[:, None]).reshape(solved.weight.shape))
    _give_bias(solved, merged.bias)
    module: nn.Module = solved
    return module


def with_weights(layer: nn.Module, merged: MergedLayer) -> nn.Module:
    """A copy of a layer with other weights; a bias that is zero throughout is not added where the layer had none."""
    copied: Any = copy.deepcopy(layer)
    tuned: bool = copied.weight.requires_grad
    copied.weight = nn.Parameter(merged.weight.detach().clone().to(copied.weight.dtype), requires_grad=tuned)
    if merged.groups is not None:
        copied.groups = merged.groups
    _give_bias(copied, merged.bias)
    module: nn.Module = copied
    return module


def _give_bias(layer: Any, bias: torch.Tensor | None) -> None:
    if bias is not None and (layer.bias is not None or bool(bias.any())):
        tuned = layer.bias is not None and layer.bias.requires_grad
        layer.bias = nn.Parameter(bias.detach().clone().to(layer.weight.dtype), requires_grad=tuned)
