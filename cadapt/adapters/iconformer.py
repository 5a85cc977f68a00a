"""iConFormer: a bottleneck whose depth-wise kernels are computed from each picture (arXiv 2409.02838).

Jo et al., "iConFormer: Dynamic Parameter-Efficient Tuning with Input-Conditioned Adaptation". No official code is
public, and this is our reading of the paper: the kernel generator, its pooling, prefix tokens, and all about ConvNets,
which the paper does not have, are decided here and said where they are decided.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from timm.layers import create_act_layer, get_act_layer
from torch import nn
from torch.nn import functional

from cadapt.adapters.scaling import with_scale_folded
from cadapt.adapters.scheme import Placement, Refusal, Scheme, joining
from cadapt.adapters.tokens import explain_grid, from_map, to_map
from cadapt.errors import UsageError
from cadapt.plan import Form
from cadapt.site import Layout, Pair, Site

_LARGEST_KERNEL = 63
_LARGEST_RANK = 65_536
_SMALLEST_SCALE, _LARGEST_SCALE = 1e-6, 1e6


@dataclass(frozen=True, kw_only=True)
class IConFormerConfig:
    """Settings of iConFormer.

    Args:
        r: channels of the bottleneck, whatever the width of the base; it gives the paper's 1.6 to 2.8 % on ViTs.
        kernel: kernel size K of the generated depth-wise kernels, odd.
        s: scale of the adapter's output, fixed.
        activation: σ by timm's name, ``identity`` for none; None is the backbone's own at this place.
        normalise: where the pooled features are brought to length 1 before kernels are computed from them: beside whole
            ``blocks``, ``never`` or ``always``. A norm stands before a transformer's MLP, so that kernels that grow
            with their input stay small. None stands before a block: there Δ would grow with the square of the features,
            which it adds to, and a few blocks would carry that beyond what floats hold.

    Raises:
        UsageError: a value out of its range, or an activation that timm does not have.
    """

    r: int = 64
    kernel: int = 3
    s: float = 1.0
    activation: str | None = None
    normalise: Literal["blocks", "never", "always"] = "blocks"

    def __post_init__(self) -> None:
        if not 1 <= self.r <= _LARGEST_RANK:
            raise UsageError(f"r is {self.r}, expected 1 to {_LARGEST_RANK}", hint="try --set r=64")
        if not 1 <= self.kernel <= _LARGEST_KERNEL or self.kernel % 2 == 0:
            raise UsageError(f"kernel is {self.kernel}, expected an odd number from 1 to {_LARGEST_KERNEL}")
        if not _SMALLEST_SCALE < abs(self.s) < _LARGEST_SCALE:
            raise UsageError(f"s is {self.s:g}, expected a number other than 0", hint="try --set s=1")
        if self.activation is not None and not _is_activation(self.activation):
            raise UsageError(f"unknown activation '{self.activation}'", hint="relu, gelu, silu, hard_swish, identity …")


def _is_activation(name: str) -> bool:
    try:
        return name == "identity" or get_act_layer(name) is not None
    except (KeyError, AssertionError):
        return False


class InputConditionedAdapter(nn.Module):
    """Δ(x) = s · W_up(z + k ∗ z) with z = σ(W_d x) and kernels k = G · mean(z) of the picture's own.

    With ``normalise`` the kernels are G · mean(z) / ‖mean(z)‖.

    Maps ``[B, C_in, H, W]`` to ``[B, C_out, ⌈H/stride⌉, ⌈W/stride⌉]``: W_d is a 1×1 convolution with the stride, and
    all else runs on the output's grid. Where ``layout`` says that the base passes ``[B, H, W, C]`` or tokens
    ``[B, P + H·W, C]``, the result is of that kind as well; ``grid`` is the input tokens' (H, W). The mean is over the
    grid. Of P ``prefix_tokens`` each goes through as a picture of one pixel, with the kernels of the picture it belongs
    to, so that their centre taps alone act (as in Convpass, arXiv 2207.07039, section 3.2).
    Parameters: (C_in + 1)·r + (r + 1)·r·K² + (r + 1)·C_out.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck: int,
        kernel: int,
        scale: float,
        activation: str,
        normalise: bool,
        stride: Pair = (1, 1),
        layout: Layout = "NCHW",
        grid: Pair | None = None,
        prefix_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.down = nn.Conv2d(in_channels, bottleneck, 1, stride=stride)
        self.activation = nn.Identity() if activation == "identity" else create_act_layer(activation)
        self.generator = nn.Linear(bottleneck, bottleneck * kernel**2)
        self.up = nn.Conv2d(bottleneck, out_channels, 1)
        self.kernel, self.scale, self.normalise = kernel, scale, normalise
        self.layout, self.grid, self.prefix_tokens = layout, grid, prefix_tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return Δ(x); shapes as the class says."""
        picture, prefix = to_map(x, self.layout, self.grid, self.prefix_tokens)
        hidden = self.activation(self.down(picture))
        pooled = hidden.mean((2, 3))
        if self.normalise:
            pooled = functional.normalize(pooled, dim=1)
        kernels = self.generator(pooled).unflatten(1, (-1, self.kernel, self.kernel))
        if torch.compiler.is_exporting():
            # as a convolution's groups the batch would be fixed in the file
            convolved = convolve_by_shifts(hidden, kernels)
        else:
            convolved = convolve_by_groups(hidden, kernels)
        delta = self._finish(hidden + convolved)
        if self.prefix_tokens:
            prefix = self._adapt_prefix(prefix, kernels)
        return from_map(delta, prefix, self.layout, self.prefix_tokens)

    def _adapt_prefix(self, prefix_BCP1: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
        """Δ of the prefix tokens, which have no neighbours and no stride."""
        hidden = self.activation(functional.conv2d(prefix_BCP1, self.down.weight, self.down.bias))
        centre = kernels[:, :, self.kernel // 2, self.kernel // 2, None, None]
        return self._finish(hidden + centre * hidden)

    def _finish(self, hidden: torch.Tensor) -> torch.Tensor:
        delta: torch.Tensor = self.up(hidden)
        return delta if self.scale == 1.0 else self.scale * delta


def convolve_by_groups(maps: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """Convolve each channel of each sample with a kernel of its own, in one grouped convolution.

    Args:
        maps: ``[B, r, H, W]``.
        kernels: ``[B, r, K, K]``, K odd. As everywhere in torch they are not flipped.

    Returns:
        ``[B, r, H, W]``; beyond the border the maps are zero.
    """
    groups, side = kernels.shape[0] * kernels.shape[1], kernels.shape[2]
    weight = kernels.reshape(groups, 1, side, side)
    flat = maps.reshape(1, groups, *maps.shape[2:])
    return functional.conv2d(flat, weight, padding=side // 2, groups=groups).view(maps.shape)


def convolve_by_shifts(maps: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """Compute what :func:`convolve_by_groups` does as a sum of K² shifted products, which knows no batch size."""
    height, width = maps.shape[2:]
    side = kernels.shape[2]
    reach = side // 2
    padded = functional.pad(maps, (reach, reach, reach, reach))
    total = torch.zeros_like(maps)
    for row in range(side):
        for column in range(side):
            tap = kernels[:, :, row, column, None, None]
            total = total + tap * padded[:, :, row : row + height, column : column + width]
    return total


def _select(sites: Iterable[Site], config: IConFormerConfig) -> tuple[Placement, ...]:
    """One adapter for each block on a grid: beside its MLP, or beside the block where there is none.

    The paper puts it beside the MLP of a transformer's block. Blocks of convolutions, and in hybrids those blocks that
    have no MLP of linear layers, get it beside the whole block. A block with several MLPs (MLP-Mixer's, which mixes
    tokens by the first) gets it beside the last.
    """
    on_grid = [site for site in sites if site.kind in ("block", "mlp") and site.grid is not None]
    blocks = [site for site in on_grid if site.kind == "block"]
    last_mlp: dict[tuple[str, int], Site] = {}
    for site in on_grid:
        if site.kind == "mlp":
            around = [block.path for block in blocks if _contains(block, site)]
            home = max(around, key=len) if around else site.path.rpartition(".")[0]
            last_mlp[home, site.call] = site
    mlps = list(last_mlp.values())
    return tuple(
        Placement(site=site, form="bypass" if site.kind == "mlp" else "parallel")
        for site in on_grid
        if (site in mlps if site.kind == "mlp" else not any(_contains(site, mlp) for mlp in mlps))
    )


def _contains(block: Site, inner: Site) -> bool:
    return block.call == inner.call and (not block.path or inner.path.startswith(f"{block.path}."))


def _explain_misfit(site: Site, form: Form, config: IConFormerConfig) -> str | None:
    """Why no such adapter can stand at a site, or None where it can."""
    if form == "sequential":
        return "it reads what its component reads and stands beside it, not behind it"
    reason = explain_grid(site, form)
    if reason is not None:
        return reason
    grid, out_grid = site.grid, site.output_grid
    assert grid is not None and out_grid is not None, site.name
    reached = (-(-grid[0] // site.stride[0]), -(-grid[1] // site.stride[1]))
    if reached != out_grid:
        return (
            f"a 1×1 convolution with stride {_show(site.stride)} takes its {_show(grid)} grid to {_show(reached)}, "
            f"not to {_show(out_grid)}"
        )
    return None


def _show(sides: Pair) -> str:
    return f"{sides[0]}×{sides[1]}"


def _build(site: Site, form: Form, config: IConFormerConfig) -> InputConditionedAdapter:
    adapter = InputConditionedAdapter(
        site.in_channels,
        site.out_channels,
        bottleneck=config.r,
        kernel=config.kernel,
        scale=config.s,
        activation=config.activation or site.activation,
        normalise=config.normalise == "always" or (config.normalise == "blocks" and site.kind == "block"),
        stride=site.stride,
        layout=site.layout,
        grid=site.grid,
        prefix_tokens=site.prefix_tokens,
    )
    # W_up at zero makes Δ zero; the kernels are not, so that they learn from the first step that W_up has made
    nn.init.xavier_uniform_(adapter.down.weight)
    nn.init.xavier_uniform_(adapter.generator.weight)
    nn.init.zeros_(adapter.up.weight)
    for layer in (adapter.down, adapter.generator, adapter.up):
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
    return adapter


def _merge(site: Site, form: Form, adapter: nn.Module, layer: nn.Module | None) -> Refusal:
    return Refusal(reason="its convolution's weights are computed from each input, which no fixed weights can equal")


def fold_scale(adapter: nn.Module, config: IConFormerConfig) -> tuple[nn.Module, IConFormerConfig]:
    """Return an equal adapter with s = 1, folded into its last map."""
    return with_scale_folded(adapter), replace(config, s=1.0)


SCHEMES = (
    Scheme(
        name="iconformer",
        paper="arXiv 2409.02838",
        summary="a bottleneck convolved with kernels computed from each picture, parallel to each MLP or block",
        config=IConFormerConfig,
        needs="blocks on a grid, or MLPs of blocks on one",
        joins=joining("bypass", "mlp") | joining("parallel", "block"),
        select=_select,
        fits=_explain_misfit,
        build=_build,
        merge=_merge,
        simplify=fold_scale,
    ),
)
