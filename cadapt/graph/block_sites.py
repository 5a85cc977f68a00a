"""Blocks and stages as sites: whole units of a model, which the ``res-`` schemes adapt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from cadapt.graph.anatomy import Anatomy, Located
from cadapt.graph.blocks import Block
from cadapt.graph.convs import fit_grid
from cadapt.graph.geometry import functional_conv, odd, window_of
from cadapt.site import Site


def block_sites(anatomy: Anatomy) -> Iterable[Located]:
    """Every block, and around blocks that lie on no grid the module call that does."""
    found = [located for block in anatomy.blocks if (located := _block_site(anatomy, block)) is not None]
    yield from found
    on_grid = {node for located in found if located.site.grid for node in (located.input, located.output)}
    around: dict[str, Located] = {}
    for block in anatomy.blocks:
        outer = _on_grid_around(anatomy, block) if not on_grid & {block.input, block.output} else None
        if outer is not None and not on_grid & {*outer.scope.nodes}:
            located = _block_site(anatomy, outer)
            if located is not None:
                around[outer.scope.key] = located
    yield from around.values()


def _block_site(anatomy: Anatomy, block: Block) -> Located | None:
    layout = anatomy.layout(block.input, block.scope.nodes)
    site = anatomy.site("block", block.scope.path, block.scope.call, block.input, block.output, layout)
    if site is None:
        return None
    return Located(site=_described(anatomy, site, block), input=block.input, output=block.output)


def _on_grid_around(anatomy: Anatomy, block: Block) -> Block | None:
    """The innermost module call around a block that goes from grid to grid: blocks of windows lie on none."""
    key = block.scope.parent
    while key is not None:
        scope = anatomy.scopes[key]
        crossing = anatomy.crossings.find(scope.nodes)
        layout = anatomy.layout(crossing[0], scope.nodes) if crossing else "NCHW"
        if crossing and all(anatomy.grids.find(node, layout) for node in crossing):
            return Block(scope=scope, input=crossing[0], output=crossing[1], operator=scope.kind.__name__)
        key = scope.parent
    return None


def _described(anatomy: Anatomy, site: Site, block: Block) -> Site:
    """A block's or stage's site with what is known of its functional conv or its attention."""
    site = replace(
        site,
        activation=anatomy.activation(block.scope.nodes),
        operator=block.operator,
        stage=anatomy.stage_of.get(block.scope.key),
    )
    conv = functional_conv(block, anatomy.units)
    if conv is not None:
        conv = replace(conv, kernel=odd(conv.kernel))
        if site.grid and site.output_grid:
            conv = fit_grid(conv, site.grid, site.output_grid)
        return replace(
            site,
            kernel=conv.kernel,
            stride=conv.stride,
            dilation=conv.dilation,
            padding=conv.padding,
            groups=conv.groups,
        )
    windows = (window_of(residual, site.grid, anatomy.usual_window) for residual in block.residuals)
    window = next((item for item in windows if item is not None), None)
    return replace(site, kernel=window, padding=(window[0] // 2, window[1] // 2)) if window else site


def stage_sites(anatomy: Anatomy) -> Iterable[Located]:
    """Every stage, from what its first block reads to what its last one gives.

    It bears its parent's path; where a parent holds several stages in one row, that of its first block.
    """
    groups: dict[int, list[Block]] = {}
    for block in anatomy.blocks:
        groups.setdefault(anatomy.stage_of[block.scope.key], []).append(block)
    parents = Counter(blocks[0].scope.parent for blocks in groups.values())
    for stage, blocks in groups.items():
        start, end = blocks[0].input, blocks[-1].output
        layout = anatomy.layout(start, blocks[0].scope.nodes)
        parent = blocks[0].scope.parent
        named = anatomy.scopes[parent] if parent and parents[parent] == 1 else blocks[0].scope
        site = anatomy.site("stage", named.path, named.call, start, end, layout)
        if site is not None:
            site = replace(_described(anatomy, site, blocks[0]), operator="", groups=1, stage=stage)
            yield Located(site=site, input=start, output=end)
