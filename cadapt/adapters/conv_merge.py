"""When a Conv-Adapter folds into the convolution it stands beside, and how.

Without a non-linearity Δ is one convolution: PW∘DW has the kernel Σ_j P[o, j] D[j, c] over the bottleneck. Parallel to
a conv with the same stride, padding and dilation it adds to that conv's kernel: W + α·PW∘DW. Behind a conv, a 1×1 Δ
mixes that conv's outputs: (I + α·PW·DW) W. All of it is computed in fp64.
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


def merge_conv_adapter(site: Site, form: Form, adapter: nn.Module, layer: nn.Module | None) -> MergedLayer | Refusal:
    """Fold a trained Conv-Adapter into the conv of its site, or say why it cannot be.

    Args:
        site: where the adapter stands.
        form: how it joins.
        adapter: the adapter module.
        layer: the base's module at the site's path.

    Returns:
        The conv's new weight and bias in fp64, or the refusal.
    """
    parts: Any = adapter
    if not isinstance(parts.activation, nn.Identity):
        kind = type(parts.activation).__name__
        return Refusal(reason=f"its {kind} between the two convs is not linear")
    if site.kind not in ("conv", "downsample") or not isinstance(layer, nn.Conv2d):
        return Refusal(reason=_name_what_it_is(site, layer))
    if site.operator != type(layer).__name__:
        return Refusal(reason=f"it joins a {site.operator} of several convs, of which this is one")
    if type(layer) not in _PLAIN_CONVS:
        return Refusal(reason=f"the weight of a {type(layer).__name__} is computed at run time, not a plain kernel")
    if layer.padding_mode != "zeros":
        return Refusal(reason=f"the conv pads by '{layer.padding_mode}', the adapter by zeros")
    if form == "sequential":
        return _merge_behind(parts, layer)
    return _merge_beside(parts, layer)


def _name_what_it_is(site: Site, layer: nn.Module | None) -> str:
    """Why a site whose layer is no conv has nowhere to fold an adapter to, by what stands there."""
    if site.kind not in ("conv", "downsample") or layer is None:
        return f"what the {site.kind} computes is not one conv that could take it up"
    kind = site.operator or type(layer).__name__
    convs = sum(isinstance(module, nn.Conv2d) for module in layer.modules())
    if convs > 1:
        return f"the {kind} is {convs} convs side by side, and not one that could take it up"
    return f"the {kind} is no plain conv: it has no kernel of its own that could take it up"


def _composed(parts: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Δ as one dense conv: kernel [C_out, C_in, K, K] and bias [C_out], fp64."""
    depth, point = parts.depthwise, parts.pointwise
    grouped = depth.weight.detach().double()
    width, per_group = grouped.shape[:2]
    dense = grouped.new_zeros((width, depth.in_channels, *grouped.shape[2:]))
    outputs_per_group = width // depth.groups
    for row in range(width):
        start = (row // outputs_per_group) * per_group
        dense[row, start : start + per_group] = grouped[row]
    mix = point.weight.detach().double()[:, :, 0, 0]
    alpha = parts.fixed_alpha if parts.alpha is None else parts.alpha.detach().double().flatten()
    scaled = mix * alpha if isinstance(alpha, float) else mix * alpha[:, None]
    kernel = torch.einsum("ow,wchk->ochk", scaled, dense)
    bias = scaled @ depth.bias.detach().double() + point.bias.detach().double() * alpha
    return kernel, bias


def _merge_beside(parts: Any, layer: nn.Conv2d) -> MergedLayer | Refusal:
    depth = parts.depthwise
    if depth.dilation != layer.dilation or depth.stride != layer.stride:
        return Refusal(reason="the adapter's stride or dilation is not the conv's")
    kernel, bias = _composed(parts)
    margins = [(wide - narrow) for wide, narrow in zip(layer.kernel_size, depth.kernel_size, strict=True)]
    if min(margins) < 0:
        return Refusal(reason=f"its {depth.kernel_size} kernel is larger than the conv's {layer.kernel_size}")
    rows, columns = margins[0] // 2, margins[1] // 2
    kernel = nn.functional.pad(kernel, (columns, margins[1] - columns, rows, margins[0] - rows))
    per_group = layer.in_channels // layer.groups
    inside = _group_mask(layer, kernel)
    if layer.groups > 1 and bool(kernel[~inside].any()):
        cost = layer.groups
        return Refusal(reason=f"the conv has {layer.groups} groups; the sum would be dense, {cost} times its cost")
    if layer.groups > 1:
        kernel = kernel[inside].reshape(layer.out_channels, per_group, *layer.kernel_size)
    return _sum(layer, kernel, bias)


def _group_mask(layer: nn.Conv2d, kernel: torch.Tensor) -> torch.Tensor:
    """Which weights of the dense kernel the grouped conv has as well."""
    outputs = torch.arange(layer.out_channels) // (layer.out_channels // layer.groups)
    inputs = torch.arange(layer.in_channels) // (layer.in_channels // layer.groups)
    same = (outputs[:, None] == inputs[None, :]).to(kernel.device)
    return same[:, :, None, None].expand_as(kernel)


def _merge_behind(parts: Any, layer: nn.Conv2d) -> MergedLayer | Refusal:
    if max(parts.depthwise.kernel_size) > 1:
        return Refusal(reason="a kernel over 1 behind a conv sees its zero padding: the two are not one conv")
    if layer.groups > 1:
        return Refusal(reason=f"the conv has {layer.groups} groups; mixing its outputs would be dense")
    kernel, bias = _composed(parts)
    mix = kernel[:, :, 0, 0]
    weight = layer.weight.detach().double()
    old_bias = weight.new_zeros(layer.out_channels) if layer.bias is None else layer.bias.detach().double()
    return _sum(layer, torch.einsum("op,pchk->ochk", mix, weight), mix @ old_bias + bias)


def _sum(layer: nn.Conv2d, kernel: torch.Tensor, bias: torch.Tensor) -> MergedLayer:
    old = 0.0 if layer.bias is None else layer.bias.detach().double()
    return MergedLayer(weight=layer.weight.detach().double() + kernel, bias=bias + old)
