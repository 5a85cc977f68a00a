"""When what stands beside or behind a convolution folds into it, and how.

Beside a conv with the same stride and dilation, a linear map with a kernel k adds to that conv's: W + k, its centre on
the centre tap of W. Behind a conv, a 1×1 map A mixes that conv's outputs: (I + A) W. Conv-Adapter without its
non-linearity is such a map, Σ_j P[o, j] D[j, c] over the bottleneck. A grouped conv keeps its groups where the sum
stays within them, else it has as many as hold all that the sum connects. All of it is computed in fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import nn

from cadapt.adapters.conv_reach import pads
from cadapt.adapters.scheme import Fold, MergedLayer, Refusal, Regrouped
from cadapt.plan import Form
from cadapt.site import Site

_PLAIN_CONVS = (nn.Conv2d, Conv2dSame)
_CONV_SITES = ("conv", "downsample", "linear")


def merge_conv_adapter(site: Site, form: Form, adapter: nn.Module, layer: nn.Module | None) -> Fold:
    """Fold a trained Conv-Adapter into the conv of its site, or say why it cannot be.

    Args:
        site: where the adapter stands.
        form: how it joins.
        adapter: the adapter module.
        layer: the base's module at the site's path.

    Returns:
        The conv's new weight and bias in fp64, with other groups where the sum needs them, or the refusal.
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
        mix = _mixed(parts)
        return fold_behind(conv, (mix @ _dense_depthwise(parts).flatten(1)), _bias_of(parts, mix))
    if depth.dilation != conv.dilation or depth.stride != conv.stride:
        return Refusal(reason="the adapter's stride or dilation is not the conv's")
    return _compose_beside(conv, parts)


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
    if layer.padding_mode != site.padding_mode and pads(layer):
        return Refusal(reason=f"the conv pads by '{layer.padding_mode}', the adapter by '{site.padding_mode}'")
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


def _mixed(parts: Any) -> torch.Tensor:
    """α ⊙ P, ``[C_out, w]`` in fp64."""
    point: torch.Tensor = parts.pointwise.weight.detach().double()[:, :, 0, 0]
    alpha = parts.fixed_alpha if parts.alpha is None else parts.alpha.detach().double().flatten()[:, None]
    scaled: torch.Tensor = point * alpha
    return scaled


def _bias_of(parts: Any, mix: torch.Tensor) -> torch.Tensor:
    """α ⊙ (P d + b) for the biases d and b of the two convs, ``[C_out]`` in fp64."""
    alpha = parts.fixed_alpha if parts.alpha is None else parts.alpha.detach().double().flatten()
    bias: torch.Tensor = mix @ parts.depthwise.bias.detach().double() + parts.pointwise.bias.detach().double() * alpha
    return bias


def _dense_depthwise(parts: Any) -> torch.Tensor:
    """D as one dense kernel, ``[w, C_in, K, L]`` in fp64."""
    depth = parts.depthwise
    return regroup(depth.weight.detach().double(), depth.groups, 1)


def _compose_beside(conv: nn.Conv2d, parts: Any) -> Fold:
    """α PW∘DW beside a conv, its kernel composed only once it is known how many groups it leaves."""
    mix, depth = _mixed(parts), _dense_depthwise(parts)
    side = (depth.shape[2], depth.shape[3])
    if side[0] > conv.kernel_size[0] or side[1] > conv.kernel_size[1]:
        return Refusal(reason=f"its {side} kernel is larger than the conv's {conv.kernel_size}")
    reached = (mix != 0).double() @ (depth != 0).flatten(2).any(dim=2).double()

    def compose() -> torch.Tensor:
        return _centred(torch.einsum("ow,wchk->ochk", mix, depth), conv)

    return _join(conv, reached > 0, compose, _bias_of(parts, mix))


def fold_beside(layer: nn.Conv2d, kernel: torch.Tensor, bias: torch.Tensor | None) -> Fold:
    """Add a conv that reads the same input to a conv, the centre of its kernel on the centre tap.

    Args:
        layer: the conv, which stays as it is.
        kernel: dense, ``[C_out, C_in, k, l]`` in fp64, for the conv's own stride and dilation.
        bias: ``[C_out]`` in fp64, or None.

    Returns:
        The sum in fp64, of fewer groups where the kernel leaves the conv's, or a refusal where it is the larger one.
    """
    side = (kernel.shape[2], kernel.shape[3])
    if side[0] > layer.kernel_size[0] or side[1] > layer.kernel_size[1]:
        return Refusal(reason=f"its {side} kernel is larger than the conv's {layer.kernel_size}")
    connected = (kernel != 0).flatten(2).any(dim=2)
    return _join(layer, connected, lambda: _centred(kernel, layer), bias)


def _centred(kernel: torch.Tensor, layer: nn.Conv2d) -> torch.Tensor:
    """A kernel with zeros around it, of the side of a layer's own."""
    rows, columns = (wide - narrow for wide, narrow in zip(layer.kernel_size, kernel.shape[2:], strict=True))
    before = (columns // 2, rows // 2)
    return nn.functional.pad(kernel, (before[0], columns - before[0], before[1], rows - before[1]))


def fold_behind(layer: nn.Conv2d, mix: torch.Tensor, bias: torch.Tensor | None) -> MergedLayer | Regrouped:
    """Add a 1×1 conv of a conv's output to that output: (I + A) W, and (I + A) b + its bias.

    Args:
        layer: the conv, which stays as it is.
        mix: A, ``[C_out, C_out]`` in fp64.
        bias: ``[C_out]`` in fp64, or None.

    Returns:
        The sum in fp64, of fewer groups where A mixes outputs of several.
    """
    added = bias
    if layer.bias is not None:
        mixed = mix @ layer.bias.detach().double()
        added = mixed if bias is None else mixed + bias
    connected = (mix != 0).double() @ _blocks(layer, layer.groups).double() > 0

    def compose() -> torch.Tensor:
        own = regroup(layer.weight.detach().double(), layer.groups, 1)
        return torch.einsum("op,pchk->ochk", mix, own)

    return _join(layer, connected, compose, added)


def _join(
    layer: nn.Conv2d, connected: torch.Tensor, compose: Callable[[], torch.Tensor], bias: torch.Tensor | None
) -> MergedLayer | Regrouped:
    """A conv's weight and bias with a dense kernel of its size added, in as many groups as hold what it connects.

    Args:
        layer: the conv.
        connected: which inputs the kernel brings to which outputs, ``[C_out, C_in]``.
        compose: computes the kernel, ``[C_out, C_in, K, L]`` in fp64.
        bias: ``[C_out]``, or None.
    """
    divisors = [number for number in range(layer.groups, 0, -1) if layer.groups % number == 0]
    groups = next(number for number in divisors if not bool((connected & ~_blocks(layer, number)).any()))

    def build() -> MergedLayer:
        own = regroup(layer.weight.detach().double(), layer.groups, groups)
        total = own + regroup(compose(), 1, groups)
        return MergedLayer(weight=total, bias=_total_bias(layer, bias), groups=groups)

    return build() if groups == layer.groups else Regrouped(groups=groups, build=build)


def _blocks(layer: nn.Conv2d, groups: int) -> torch.Tensor:
    """Which inputs a conv of the layer's channels in so many groups brings to which outputs, ``[C_out, C_in]``."""
    device = layer.weight.device
    outputs = torch.arange(layer.out_channels, device=device) // (layer.out_channels // groups)
    inputs = torch.arange(layer.in_channels, device=device) // (layer.in_channels // groups)
    return outputs[:, None] == inputs[None, :]


def regroup(weight: torch.Tensor, groups: int, wanted: int) -> torch.Tensor:
    """The weight of the same conv with another number of groups.

    Args:
        weight: ``[C_out, C_in / groups, K, L]``.
        groups: of the conv it is of.
        wanted: a divisor of ``groups``, for a conv with zeros between the old groups; or, for ``groups`` of 1, any
            number whose groups hold all that is not zero.
    """
    if groups == wanted:
        return weight
    outputs, per_group = weight.shape[:2]
    if groups == 1:
        split = weight.reshape(wanted, outputs // wanted, wanted, per_group // wanted, *weight.shape[2:])
        return split.diagonal(dim1=0, dim2=2).movedim(-1, 0).reshape(outputs, -1, *weight.shape[2:])
    joined = groups // wanted
    blocks = weight.reshape(wanted, joined, outputs // groups, per_group, *weight.shape[2:])
    wide = weight.new_zeros((wanted, joined, outputs // groups, joined, per_group, *weight.shape[2:]))
    for index in range(joined):
        wide[:, index, :, index] = blocks[:, index]
    return wide.reshape(outputs, joined * per_group, *weight.shape[2:])


def add_to_layer(layer: nn.Conv2d | nn.Linear, weight: torch.Tensor, bias: torch.Tensor | None) -> MergedLayer:
    """A conv's or linear layer's weight and bias with others of their shapes added, in fp64; None is no bias."""
    return MergedLayer(weight=layer.weight.detach().double() + weight, bias=_total_bias(layer, bias))


def _total_bias(layer: nn.Conv2d | nn.Linear, bias: torch.Tensor | None) -> torch.Tensor | None:
    own = None if layer.bias is None else layer.bias.detach().double()
    return own if bias is None else bias if own is None else own + bias
