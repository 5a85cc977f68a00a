"""When what stands beside or behind a convolution folds into it, and how.

Beside a conv with the same stride and dilation, a linear map with a kernel k adds to that conv's: W + k, its centre on
the centre tap of W. Behind a conv, a 1×1 map A mixes that conv's outputs: (I + A) W. Conv-Adapter without its
non-linearity is such a map, Σ_j P[o, j] D[j, c] over the bottleneck. All of it is computed in fp64.
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
_CONV_SITES = ("conv", "downsample", "linear")


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
    if parts.pool > 1:
        return Refusal(reason="it works on pooled maps, which no single conv does")
    if not isinstance(parts.activation, nn.Identity):
        kind = type(parts.activation).__name__
        return Refusal(reason=f"its {kind} between the two convs is not linear")
    conv = find_plain_conv(site, layer)
    if isinstance(conv, Refusal):
        return conv
    depth = parts.depthwise
    if form == "sequential":
        if max(depth.kernel_size) > 1:
            return Refusal(reason="a kernel over 1 behind a conv sees its zero padding: the two are not one conv")
        kernel, bias = _composed(parts)
        return fold_behind(conv, kernel[:, :, 0, 0], bias)
    if depth.dilation != conv.dilation or depth.stride != conv.stride:
        return Refusal(reason="the adapter's stride or dilation is not the conv's")
    return fold_beside(conv, *_composed(parts))


def find_plain_conv(site: Site, layer: nn.Module | None) -> nn.Conv2d | Refusal:
    """The conv that an adapter of a site could fold into, or why there is none.

    Args:
        site: where the adapter stands: a conv, one between stages, or a 1×1 conv among the linear layers.
        layer: the base's module at the site's path.
    """
    if site.kind not in _CONV_SITES or not isinstance(layer, nn.Conv2d):
        return Refusal(reason=_name_what_it_is(site, layer))
    if site.operator != type(layer).__name__:
        return Refusal(reason=f"it joins a {site.operator} of several convs, of which this is one")
    if type(layer) not in _PLAIN_CONVS:
        return Refusal(reason=f"the weight of a {type(layer).__name__} is computed at run time, not a plain kernel")
    if layer.padding_mode != "zeros":
        return Refusal(reason=f"the conv pads by '{layer.padding_mode}', the adapter by zeros")
    return layer


def _name_what_it_is(site: Site, layer: nn.Module | None) -> str:
    """Why a site whose layer is no conv has nowhere to fold an adapter to, by what stands there."""
    if site.kind not in _CONV_SITES or layer is None:
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


def fold_beside(layer: nn.Conv2d, kernel: torch.Tensor, bias: torch.Tensor | None) -> MergedLayer | Refusal:
    """Add a conv that reads the same input to a conv, the centre of its kernel on the centre tap.

    Args:
        layer: the conv, which stays as it is.
        kernel: dense, ``[C_out, C_in, k, l]`` in fp64, for the conv's own stride and dilation.
        bias: ``[C_out]`` in fp64, or None.

    Returns:
        The sum in fp64, or a refusal where the kernel is the larger one or leaves the conv's groups.
    """
    side = (kernel.shape[2], kernel.shape[3])
    margins = [(wide - narrow) for wide, narrow in zip(layer.kernel_size, side, strict=True)]
    if min(margins) < 0:
        return Refusal(reason=f"its {side} kernel is larger than the conv's {layer.kernel_size}")
    rows, columns = margins[0] // 2, margins[1] // 2
    kernel = nn.functional.pad(kernel, (columns, margins[1] - columns, rows, margins[0] - rows))
    inside = _group_mask(layer, kernel)
    if layer.groups > 1 and bool(kernel[~inside].any()):
        cost = layer.groups
        return Refusal(reason=f"the conv has {layer.groups} groups; the sum would be dense, {cost} times its cost")
    if layer.groups > 1:
        kernel = kernel[inside].reshape(layer.weight.shape)
    return add_to_layer(layer, kernel, bias)


def _group_mask(layer: nn.Conv2d, kernel: torch.Tensor) -> torch.Tensor:
    """Which weights of the dense kernel the grouped conv has as well."""
    outputs = torch.arange(layer.out_channels) // (layer.out_channels // layer.groups)
    inputs = torch.arange(layer.in_channels) // (layer.in_channels // layer.groups)
    same = (outputs[:, None] == inputs[None, :]).to(kernel.device)
    return same[:, :, None, None].expand_as(kernel)


def fold_behind(layer: nn.Conv2d, mix: torch.Tensor, bias: torch.Tensor | None) -> MergedLayer | Refusal:
    """Add a 1×1 conv of a conv's output to that output: (I + A) W, and (I + A) b + its bias.

    Args:
        layer: the conv, which stays as it is.
        mix: A, ``[C_out, C_out]`` in fp64.
        bias: ``[C_out]`` in fp64, or None.

    Returns:
        The sum in fp64, or a refusal where the conv has groups.
    """
    if layer.groups > 1:
        return Refusal(reason=f"the conv has {layer.groups} groups; mixing its outputs would be dense")
    added = bias
    if layer.bias is not None:
        mixed = mix @ layer.bias.detach().double()
        added = mixed if bias is None else mixed + bias
    return add_to_layer(layer, torch.einsum("op,pchk->ochk", mix, layer.weight.detach().double()), added)


def add_to_layer(layer: nn.Conv2d | nn.Linear, weight: torch.Tensor, bias: torch.Tensor | None) -> MergedLayer:
    """A conv's or linear layer's weight and bias with others of their shapes added, in fp64; None is no bias."""
    own = None if layer.bias is None else layer.bias.detach().double()
    total = own if bias is None else bias if own is None else own + bias
    return MergedLayer(weight=layer.weight.detach().double() + weight, bias=total)
