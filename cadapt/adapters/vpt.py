"""Visual prompt: a learned border is added to the picture, the only thing that the task changes.

Bahng et al., "Exploring Visual Prompts for Adapting Large-Scale Models", arXiv 2203.17274, section 3.2 (the padding
prompt), which the Conv-Adapter paper, arXiv 2208.07463, takes for VPT on ConvNets. Prompts among the tokens of a ViT
(Jia et al., arXiv 2203.12119) are another method.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from cadapt.adapters.scheme import MergedLayer, Placement, Refusal, Scheme, joining
from cadapt.errors import CadaptError, UsageError
from cadapt.plan import Form
from cadapt.site import Site


@dataclass(frozen=True, kw_only=True)
class BorderPromptConfig:
    """Settings of the visual prompt.

    Args:
        border: the border's width in pixels, the papers' p.
        init: ``zero`` (the inserted model computes what the backbone does) or ``paper`` (standard normal).

    Raises:
        UsageError: a border of no pixels.
    """

    border: int = 10
    init: Literal["zero", "paper"] = "zero"

    def __post_init__(self) -> None:
        if self.border < 1:
            raise UsageError(f"border is {self.border}, expected at least 1 pixel")


class BorderPrompt(nn.Module):
    """The border to add to pictures ``[B, C, H, W]``, whatever they show: as large as they are, zero in the middle.

    Stored as four strips: ``top`` and ``bottom`` ``[1, C, p, W]``, ``left`` and ``right`` ``[1, C, H − 2p, p]``.
    Parameters: 2Cp(H + W − 2p), which is 12p(H − p) for square pictures of three channels.

    >>> sum(strip.numel() for strip in BorderPrompt((3, 224, 224), border=10).parameters())
    25680
    """

    def __init__(self, shape: tuple[int, ...], *, border: int) -> None:
        super().__init__()
        channels, height, width = shape
        middle = height - 2 * border
        self.shape, self.border = (channels, height, width), border
        self.top = nn.Parameter(torch.zeros(1, channels, border, width))
        self.bottom = nn.Parameter(torch.zeros(1, channels, border, width))
        self.left = nn.Parameter(torch.zeros(1, channels, middle, border))
        self.right = nn.Parameter(torch.zeros(1, channels, middle, border))

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the border for each picture of the batch, ``[B, C, H, W]``.

        Raises:
            CadaptError: the pictures are not of the size that the border was learned for.
        """
        if tuple(x_BCHW.shape[1:]) != self.shape:
            raise CadaptError(f"the prompt is for pictures of {self.shape}, got {tuple(x_BCHW.shape[1:])}")
        channels, height, width = self.shape
        inside = self.left.new_zeros((1, channels, height - 2 * self.border, width - 2 * self.border))
        middle = torch.cat((self.left, inside, self.right), dim=3)
        prompt = torch.cat((self.top, middle, self.bottom), dim=2)
        return prompt.to(x_BCHW.dtype).expand(x_BCHW.shape[0], -1, -1, -1)


def _build(site: Site, form: Form, config: BorderPromptConfig) -> BorderPrompt:
    prompt = BorderPrompt(site.out_shape, border=config.border)
    if config.init == "paper":
        for strip in prompt.parameters():
            nn.init.normal_(strip)
    return prompt


def _select(sites: Iterable[Site], config: BorderPromptConfig) -> tuple[Placement, ...]:
    """The picture alone."""
    return tuple(Placement(site=site, form="sequential") for site in sites if site.kind == "input")


def _explain_misfit(site: Site, form: Form, config: BorderPromptConfig) -> str | None:
    """Why the border leaves no picture, or None where it does."""
    _, height, width = site.out_shape
    if 2 * config.border < min(height, width):
        return None
    largest = (min(height, width) - 1) // 2
    return f"borders of {config.border} pixels leave nothing of a {height}×{width} picture; here at most {largest} fit"


def _merge(site: Site, form: Form, adapter: nn.Module, layer: nn.Module | None) -> MergedLayer | Refusal:
    return Refusal(reason="what it adds to the picture is behind the first layer another bias at every place")


SCHEMES = (
    Scheme(
        name="vpt",
        paper="arXiv 2203.17274",
        summary="add a learned border to the picture",
        config=BorderPromptConfig,
        needs="pictures as input",
        joins=joining("sequential", "input"),
        select=_select,
        fits=_explain_misfit,
        build=_build,
        merge=_merge,
    ),
)
