"""Between what a base passes and the map that a convolution wants: tokens, channels-last maps, prefix tokens.

Every adapter that convolves needs this, and a refusal where the tokens do not lie on a grid that is known.
"""

from __future__ import annotations

import torch

from cadapt.plan import Form
from cadapt.site import Layout, Pair, Site


def to_map(x: torch.Tensor, layout: Layout, grid: Pair | None, prefix_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay what a base passes out as a map.

    Args:
        x: ``[B, C, H, W]``, ``[B, H, W, C]`` or tokens ``[B, P + H·W, C]``.
        layout: which of them it is.
        grid: height and width of the tokens' grid; read for tokens only.
        prefix_tokens: P, read for tokens only.

    Returns:
        The map ``[B, C, H, W]``, and the prefix tokens as pictures of one column ``[B, C, P, 1]``, P being 0 for maps.
    """
    if layout == "NLC":
        assert grid is not None
        x_BCN = x.transpose(1, 2)
        prefix, tokens = x_BCN[:, :, :prefix_tokens], x_BCN[:, :, prefix_tokens:]
        return torch.unflatten(tokens, 2, grid), prefix.unsqueeze(3)
    map_BCHW = x.permute(0, 3, 1, 2) if layout == "NHWC" else x
    return map_BCHW, map_BCHW[:, :, :0, :1]


def from_map(map_BCHW: torch.Tensor, prefix_BCP1: torch.Tensor, layout: Layout, prefix_tokens: int = 0) -> torch.Tensor:
    """Undo :func:`to_map`; the prefix is read only where there are ``prefix_tokens``."""
    if layout == "NLC":
        tokens = map_BCHW.flatten(2)
        if prefix_tokens:
            tokens = torch.cat((prefix_BCP1.squeeze(3), tokens), dim=2)
        return tokens.transpose(1, 2)
    return map_BCHW.permute(0, 2, 3, 1) if layout == "NHWC" else map_BCHW


def explain_grid(site: Site, form: Form) -> str | None:
    """Why what an adapter reads and joins at a site cannot be laid out as maps, or None where it can."""
    sides = [("output", site.out_shape, site.output_grid)]
    if form != "sequential":
        sides.insert(0, ("input", site.in_shape, site.grid))
    for name, shape, grid in sides:
        if grid is None:
            tokens = f"its {shape[0]} tokens lie" if shape[0] > 1 else "its single token lies"
            where = f"{tokens} on no grid that is known" if site.layout == "NLC" else "it has no grid"
            return f"{where}, so that no convolution could work"
        if site.layout == "NLC" and shape[0] != site.prefix_tokens + grid[0] * grid[1]:
            sides_shown = f"{grid[0]}×{grid[1]}"
            return f"its {name}'s {shape[0]} tokens are not {site.prefix_tokens} prefix tokens and a {sides_shown} grid"
    return None
