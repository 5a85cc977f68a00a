"""SSF: a learned scale and shift of the channels behind every layer, which fold into the layers after training.

Lian et al., "Scaling & Shifting Your Features", arXiv 2210.08823, equations 2 to 4: y = γ ⊙ h + β behind each
convolution, linear layer and norm. As an adapter adds, what joins here is Δ(h) = y − h.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm import layers
from torch import nn

from cadapt.adapters.scheme import MergedLayer, Placement, Refusal, Scheme, joining
from cadapt.plan import Form
from cadapt.site import Layout, Site

# layers whose last step is their own weight and bias
_MULTIPLYING = (nn.Conv2d, layers.Conv2dSame, nn.Linear, layers.Linear)
_NORMS = (
    nn.BatchNorm2d,
    nn.LayerNorm,
    nn.GroupNorm,
    layers.LayerNorm,
    layers.LayerNorm2d,
    layers.GroupNorm,
    layers.GroupNorm1,
)
# the same norms, with room for a dropout and an activation behind them
_NORMS_WITH_ACTIVATION = (
    layers.BatchNormAct2d,
    layers.LayerNormAct,
    layers.LayerNormAct2d,
    layers.GroupNormAct,
    layers.GroupNorm1Act,
)
_PAPER_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class ScaleShiftConfig:
    """Settings of SSF.

    Args:
        init: ``zero`` (γ = 1, β = 0: the inserted model computes what the backbone does) or ``paper`` (normal with
            deviation 0.02 about these).
    """

    init: Literal["zero", "paper"] = "zero"


class ScaleShift(nn.Module):
    """Δ(h) = (γ − 1) ⊙ h + β, arXiv 2210.08823 equation 2, γ being ``scale`` and β ``shift``, each ``[C]``.

    h is what a layer gives, ``[B, C, H, W]`` or with its channels last, as ``layout`` says. Parameters: 2C.
    """

    def __init__(self, channels: int, *, layout: Layout) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        self.layout = layout

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Return Δ(h), of h's shape and dtype."""
        # γ − 1 is rounded to a half precision of h, and not γ, which would lose the digits that were learned
        change, shift = (self.scale - 1).to(h.dtype), self.shift.to(h.dtype)
        if self.layout == "NCHW":
            change, shift = change[:, None, None], shift[:, None, None]
        return change * h + shift


def _build(site: Site, form: Form, config: ScaleShiftConfig) -> ScaleShift:
    adapter = ScaleShift(site.out_channels, layout=site.layout)
    if config.init == "paper":
        nn.init.normal_(adapter.scale, mean=1.0, std=_PAPER_STD)
        nn.init.normal_(adapter.shift, std=_PAPER_STD)
    return adapter


def _select(sites: Iterable[Site], config: ScaleShiftConfig) -> tuple[Placement, ...]:
    """Every layer with weights, the stem's and those outside blocks too."""
    return tuple(Placement(site=site, form="sequential") for site in sites if site.kind == "layer")


def _merge(site: Site, form: Form, adapter: nn.Module, layer: nn.Module | None) -> MergedLayer | Refusal:
    """Fold γ and β into the layer before them, section 3.3: W' = γW, b' = γb + β, in fp64.

    In a convolution or linear layer γ scales the rows of W, and β becomes its bias where it has none; in a norm γ
    scales its weight.
    """
    reason = _explain_unmergeable(layer)
    if reason is not None:
        return Refusal(reason=reason)
    parts: Any = adapter
    own: Any = layer
    weight = own.weight.detach().double()
    scale, shift = parts.scale.detach().double(), parts.shift.detach().double()
    bias = shift if own.bias is None else scale * own.bias.detach().double() + shift
    return MergedLayer(weight=weight * scale.reshape(-1, *(1,) * (weight.ndim - 1)), bias=bias)


def _explain_unmergeable(layer: nn.Module | None) -> str | None:
    """Why a layer cannot take scale and shift up, or None where it can."""
    kind = type(layer).__name__
    if type(layer) in _MULTIPLYING:
        return None
    if not _runs_as(layer, (*_NORMS, *_NORMS_WITH_ACTIVATION)):
        if isinstance(layer, nn.Conv2d):
            return f"the weight of a {kind} is computed at run time, not a plain kernel"
        return f"a {kind} is no plain convolution, linear layer or norm, whose last step is its weight and bias"
    parts: Any = layer
    if parts.bias is None:
        # one that was traced through would go on without the bias it is given
        return f"the {kind} has no bias that could take the shift up"
    if not _runs_as(layer, _NORMS_WITH_ACTIVATION):
        return None
    behind = next((part for part in (parts.drop, parts.act) if not isinstance(part, nn.Identity)), None)
    if behind is None:
        return None
    return f"the {type(behind).__name__} inside the {kind} stands between its weight and this scale"


def _runs_as(layer: nn.Module | None, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a layer computes what one of some types does: a subclass with other settings does, too."""
    return any(isinstance(layer, kind) and type(layer).forward is kind.forward for kind in kinds)


SCHEMES = (
    Scheme(
        name="ssf",
        paper="arXiv 2210.08823",
        summary="scale and shift the channels behind every layer",
        config=ScaleShiftConfig,
        needs="convolutions, linear layers or norms",
        joins=joining("sequential", "layer"),
        select=_select,
        build=_build,
        merge=_merge,
    ),
)
