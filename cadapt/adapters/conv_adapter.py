"""Conv-Adapter: a depth-wise separable bottleneck beside or behind convolutions and residual blocks.

Chen et al., "Conv-Adapter: Exploring Parameter Efficient Transfer Learning for ConvNets", arXiv 2208.07463:
Δ(x) = α ⊙ PW(σ(DW(x))), equation 2, in the four adapting schemes of section 3.4, figure 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from timm.layers import Conv2dSame, create_act_layer, get_act_layer
from torch import nn

from cadapt.adapters.conv_merge import merge_conv_adapter
from cadapt.adapters.scheme import Placement, Scheme
from cadapt.errors import UsageError
from cadapt.plan import Form
from cadapt.site import Pair, Site

DEFAULT_GAMMA = 4
_LARGEST_KERNEL = 63
_LARGEST_ALPHA = 1e6


@dataclass(frozen=True, kw_only=True)
class ConvAdapterConfig:
    """Settings of Conv-Adapter.

    Args:
        gamma: compression γ: the bottleneck has w = channels // γ, at least 1. A number is refused where w leaves no
            whole groups; None is 4, with w taken to the nearest width that divides the channels.
        kernel: kernel size K of the depth-wise conv; None is the adapted component's.
        conv_type: ``depthwise``; ``regular`` (no groups in the first conv); ``linear`` (both convs 1×1).
        activation: σ by timm's name, ``identity`` for none; None is the backbone's own.
        alpha: whether the per-channel scale α is ``learned`` or ``fixed`` at ``alpha_init``.
        alpha_init: its initial, or fixed, value.
        init: ``zero`` (the inserted model computes what the backbone does) or ``paper``.
    """

    gamma: int | None = None
    kernel: int | None = None
    conv_type: Literal["depthwise", "regular", "linear"] = "depthwise"
    activation: str | None = None
    alpha: Literal["learned", "fixed"] = "learned"
    alpha_init: float = 1.0
    init: Literal["zero", "paper"] = "zero"

    def __post_init__(self) -> None:
        if self.gamma is not None and self.gamma < 1:
            raise UsageError(f"γ is {self.gamma}, expected 1 or more", hint="try --gamma 4")
        if self.kernel is not None and not 1 <= self.kernel <= _LARGEST_KERNEL:
            raise UsageError(f"kernel is {self.kernel}, expected 1 to {_LARGEST_KERNEL}", hint="try --kernel 3")
        if not abs(self.alpha_init) < _LARGEST_ALPHA:
            raise UsageError(f"alpha_init is {self.alpha_init:g}, expected a number", hint="try --set alpha_init=1")
        if self.activation is not None and self.activation != "identity":
            _check_activation(self.activation)


def _check_activation(name: str) -> None:
    try:
        get_act_layer(name)
    except (KeyError, AssertionError) as error:
        raise UsageError(f"unknown activation '{name}'", hint="relu, gelu, silu, hard_swish, identity …") from error


@dataclass(frozen=True, kw_only=True)
class _Geometry:
    kernel: Pair
    stride: Pair
    padding: Pair | Literal["same"]
    dilation: Pair


class ConvAdapter(nn.Module):
    """Δ(x) = α ⊙ PW(σ(DW(x))), arXiv 2208.07463 equation 2.

    Maps ``[B, C_in, H, W]`` to ``[B, C_out, H', W']``, channels last where ``channels_last_layout`` says that the
    base passes ``[B, H, W, C]`` here. Parameters: C_in·K² + w + w·C_out + 2·C_out for w = C_in / γ.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        out_channels: int,
        *,
        geometry: _Geometry,
        groups: int,
        activation: str,
        alpha: float,
        learn_alpha: bool,
        channels_last_layout: bool,
    ) -> None:
        super().__init__()
        # TensorFlow's rule pads by the picture's size; torch's own "same" is it for stride 1 only
        same = geometry.padding == "same"
        self.depthwise = (Conv2dSame if same else nn.Conv2d)(
            in_channels,
            width,
            geometry.kernel,
            stride=geometry.stride,
            padding=0 if same else geometry.padding,
            dilation=geometry.dilation,
            groups=groups,
        )
        self.activation = nn.Identity() if activation == "identity" else create_act_layer(activation)
        self.pointwise = nn.Conv2d(width, out_channels, 1)
        self.alpha = nn.Parameter(torch.full((1, out_channels, 1, 1), alpha)) if learn_alpha else None
        self.fixed_alpha = alpha
        self.channels_last_layout = channels_last_layout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return Δ(x); shapes as the class says."""
        if self.channels_last_layout:
            x = x.permute(0, 3, 1, 2)
        delta: torch.Tensor = self.pointwise(self.activation(self.depthwise(x)))
        if self.alpha is not None:
            # in the dtype of Δ: under autocast an fp32 α would drag all that follows the joint back to fp32
            delta = self.alpha.to(delta.dtype) * delta
        elif self.fixed_alpha != 1.0:
            delta = self.fixed_alpha * delta
        return delta.permute(0, 2, 3, 1) if self.channels_last_layout else delta


def _width(site: Site, form: Form, config: ConvAdapterConfig) -> int | None:
    """The bottleneck's channels w, or None where γ leaves no whole groups."""
    channels = site.out_channels if form == "sequential" else site.in_channels
    width = max(1, channels // (config.gamma or DEFAULT_GAMMA))
    if channels % width == 0 or config.conv_type != "depthwise":
        return width
    if config.gamma is not None:
        return None
    divisors = [value for value in range(1, channels + 1) if channels % value == 0]
    return min(divisors, key=lambda value: abs(math.log(value / width)))


def _geometry(site: Site, form: Form, config: ConvAdapterConfig) -> _Geometry | None:
    """Kernel, stride and padding that keep the adapted component's grid, or None where K cannot."""
    assert site.kernel is not None, site.name
    own = site.kernel
    if form == "sequential":
        own = (own[0] - 1 + own[0] % 2, own[1] - 1 + own[1] % 2)
    wanted = (config.kernel, config.kernel) if config.kernel else own
    if config.conv_type == "linear":
        wanted = (1, 1)
    if form == "sequential":
        if wanted[0] % 2 == 0:
            return None
        padding = (site.dilation[0] * (wanted[0] // 2), site.dilation[1] * (wanted[1] // 2))
        return _Geometry(kernel=wanted, stride=(1, 1), padding=padding, dilation=site.dilation)
    if site.padding == "same":
        return _Geometry(kernel=wanted, stride=site.stride, padding="same", dilation=site.dilation)
    grown = [site.dilation[axis] * (wanted[axis] - own[axis]) for axis in (0, 1)]
    if grown[0] % 2 or grown[1] % 2:
        return None
    padding = (site.padding[0] + grown[0] // 2, site.padding[1] + grown[1] // 2)
    if min(padding) < 0:
        return None
    return _Geometry(kernel=wanted, stride=site.stride, padding=padding, dilation=site.dilation)


def _output_grid(grid: Pair, geometry: _Geometry) -> Pair:
    def side(axis: int) -> int:
        if geometry.padding == "same":
            return -(-grid[axis] // geometry.stride[axis])
        reach = geometry.dilation[axis] * (geometry.kernel[axis] - 1) + 1
        return (grid[axis] + 2 * geometry.padding[axis] - reach) // geometry.stride[axis] + 1

    return side(0), side(1)


def _fits(site: Site, form: Form, config: ConvAdapterConfig) -> str | None:
    channels = site.out_channels if form == "sequential" else site.in_channels
    if site.kernel is None or site.grid is None:
        return "it has no grid on which a convolution could work: no conv and no window attention inside"
    if _width(site, form, config) is None:
        gammas = [str(value) for value in (1, 2, 4, 8, 16, 32) if channels % value == 0]
        return f"{channels} channels do not divide by γ={config.gamma}; here γ can be {', '.join(gammas)}"
    geometry = _geometry(site, form, config)
    if geometry is None:
        shown = "×".join(str(side) for side in site.kernel)
        return f"K={config.kernel or 1} cannot keep the grid of this {shown} kernel with padding {site.padding}"
    out_grid = site.out_shape[1:] if site.layout == "NCHW" else site.out_shape[:2]
    if form == "parallel" and _output_grid(site.grid, geometry) != out_grid:
        return f"a stride of {geometry.stride} takes its grid {site.grid} not to {tuple(out_grid)}"
    return None


def _build(site: Site, form: Form, config: ConvAdapterConfig) -> ConvAdapter:
    width, geometry = _width(site, form, config), _geometry(site, form, config)
    assert width is not None and geometry is not None, site.name
    activation = config.activation or site.activation
    adapter = ConvAdapter(
        site.out_channels if form == "sequential" else site.in_channels,
        width,
        site.out_channels,
        geometry=geometry,
        groups=width if config.conv_type == "depthwise" else 1,
        activation=activation,
        alpha=config.alpha_init,
        learn_alpha=config.alpha == "learned",
        channels_last_layout=site.layout == "NHWC",
    )
    _initialise(adapter, activation, config.init)
    return adapter


@torch.no_grad()
def _initialise(adapter: ConvAdapter, activation: str, init: str) -> None:
    """The paper's initialisation (its code: kaiming for ResNets, else truncated normal); by default PW is zero."""
    for conv in (adapter.depthwise, adapter.pointwise):
        if "gelu" in activation:
            nn.init.trunc_normal_(conv.weight, std=0.02)
        else:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)
    if init == "zero":
        nn.init.zeros_(adapter.pointwise.weight)


@torch.no_grad()
def fold_alpha(adapter: nn.Module, config: ConvAdapterConfig) -> tuple[nn.Module, ConvAdapterConfig]:
    """Fold α into the point-wise conv: α ⊙ (P z + b) = (α P) z + α b. Returns an equal adapter without α.

    The argument is left as it was. Computed in fp64 and rounded once.
    """
    import copy

    folded = copy.deepcopy(adapter)
    assert isinstance(folded, ConvAdapter)
    point = folded.pointwise
    alpha = torch.full((point.out_channels,), folded.fixed_alpha, dtype=torch.float64, device=point.weight.device)
    if folded.alpha is not None:
        alpha = folded.alpha.flatten().double()
    assert point.bias is not None
    point.weight.copy_((point.weight.double() * alpha[:, None, None, None]).to(point.weight.dtype))
    point.bias.copy_((point.bias.double() * alpha).to(point.bias.dtype))
    folded.alpha, folded.fixed_alpha = None, 1.0
    return folded, replace(config, alpha="fixed", alpha_init=1.0)


def _on_convs(form: Form) -> Any:
    def select(sites: Iterable[Site], config: ConvAdapterConfig) -> tuple[Placement, ...]:
        """Functional convs and window attention; convs that join stages always in parallel (METHODS, section 1)."""
        chosen: list[Placement] = []
        for site in sites:
            if site.kind == "downsample":
                chosen.append(Placement(site=site, form="parallel"))
            elif site.kind == "conv" or (site.kind == "attention" and site.kernel is not None):
                chosen.append(Placement(site=site, form=form))
        return tuple(chosen) if any(item.site.kind != "downsample" for item in chosen) else ()

    return select


def _on_blocks(form: Form) -> Any:
    def select(sites: Iterable[Site], config: ConvAdapterConfig) -> tuple[Placement, ...]:
        """Whole residual blocks with a grid to convolve on, and the convs that join stages."""
        kinds = ("block", "downsample")
        chosen = [Placement(site=site, form=form) for site in sites if site.kind in kinds and site.kernel]
        return tuple(chosen) if any(item.site.kind == "block" for item in chosen) else ()

    return select


def _scheme(name: str, summary: str, needs: str, select: Any) -> Scheme:
    return Scheme(
        name=name,
        paper="arXiv 2208.07463",
        summary=summary,
        config=ConvAdapterConfig,
        needs=needs,
        select=select,
        fits=_fits,
        build=_build,
        merge=merge_conv_adapter,
        simplify=fold_alpha,
    )


_CONVS = "convs with a kernel over 1 inside its blocks, or window attention"
_BLOCKS = "residual blocks with a conv or window attention inside (an addition that joins a conv path to a shortcut)"
SCHEMES = (
    _scheme("conv-par", "Conv-Adapter parallel to each functional conv", _CONVS, _on_convs("parallel")),
    _scheme("conv-seq", "Conv-Adapter after each functional conv", _CONVS, _on_convs("sequential")),
    _scheme("res-par", "Conv-Adapter parallel to each residual block", _BLOCKS, _on_blocks("parallel")),
    _scheme("res-seq", "Conv-Adapter after each residual block", _BLOCKS, _on_blocks("sequential")),
)
