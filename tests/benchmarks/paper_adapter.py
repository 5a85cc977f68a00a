"""The paper's way: a Conv-Adapter as plain modules wrapped around the convs of a frozen timm model.

What one would write from Chen et al., "Conv-Adapter: Exploring Parameter Efficient Transfer Learning for ConvNets",
arXiv 2208.07463, equation 2 and figure 3 (conv-par), for training with plain autograd; one of the competitors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.benchmarks.places import find_family, find_modules, freeze_all_but_classifier, replace_module
from tests.benchmarks.unavailable import Unavailable

GAMMA = 4
# the side of Swin's attention window, which the paper takes for the kernel
_SWIN_KERNEL = 7


class ConvAdapter(nn.Module):
    """Δ(x) = α ⊙ PW(σ(DW(x))), equation 2; maps ``[B, C_in, H, W]`` to ``[B, C_out, H', W']``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        activation: Callable[[], nn.Module],
        *,
        kernel: tuple[int, ...],
        stride: tuple[int, ...] = (1, 1),
        padding: tuple[int, ...] | str = (0, 0),
    ) -> None:
        super().__init__()
        width = in_channels // GAMMA
        self.depthwise = nn.Conv2d(in_channels, width, kernel, stride, padding, groups=width)
        self.activation = activation()
        self.pointwise = nn.Conv2d(width, out_channels, 1)
        self.alpha = nn.Parameter(torch.ones(1, out_channels, 1, 1))
        # as cadapt starts, so that all compute the same function
        nn.init.zeros_(self.pointwise.weight)
        nn.init.zeros_(self.pointwise.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return Δ(x)."""
        return self.pointwise(self.activation(self.depthwise(x))) * self.alpha


class BesideConv(nn.Module):
    """h = f(x) + Δ(x) for a frozen conv f."""

    def __init__(self, conv: nn.Conv2d, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv = conv
        self.adapter = ConvAdapter(
            conv.in_channels,
            conv.out_channels,
            activation,
            kernel=conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum, shaped as the conv's output."""
        return self.conv(x) + self.adapter(x)


class BesideAttention(nn.Module):
    """Swin's block with Δ of the normalised map, before any shift, beside its window attention; ``[B, H, W, C]``."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.adapter = ConvAdapter(
            block.dim, block.dim, nn.GELU, kernel=(_SWIN_KERNEL, _SWIN_KERNEL), padding=(_SWIN_KERNEL // 2,) * 2
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, of the input's shape."""
        block = self.block
        normed = block.norm1(x)
        delta = self.adapter(normed.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + block.drop_path1(block._attn(normed) + delta)
        tokens = x.flatten(1, 2)
        return (tokens + block.drop_path2(block.mlp(block.norm2(tokens)))).view_as(x)


def add_paper_adapters(model: nn.Module, name: str) -> nn.Module:
    """Freeze a timm model but for its classifier and wrap its places; changes and returns ``model``.

    Args:
        model: fresh from timm.
        name: its timm name.

    Raises:
        Unavailable: the paper places nothing in this kind of model.
    """
    family = find_family(name)
    freeze_all_but_classifier(model)
    if family.functional is None and family.attention is None:
        raise Unavailable("the paper has no adapter for this kind of model")
    if family.attention is not None:
        for path, block in find_modules(model, family.attention).items():
            replace_module(model, path, BesideAttention(block))
        return model
    assert family.functional is not None
    activation = _activation_of(name)
    for path, conv in find_modules(model, family.functional).items():
        assert isinstance(conv, nn.Conv2d), path
        replace_module(model, path, BesideConv(conv, activation))
    return model


def _activation_of(name: str) -> Callable[[], nn.Module]:
    """The backbone's own activation, as the paper takes it; ReLU in place, for nothing else reads its input."""
    if name.startswith("convnext"):
        return nn.GELU
    if name.startswith("efficientnet"):
        return lambda: nn.SiLU(inplace=True)
    return lambda: nn.ReLU(inplace=True)
