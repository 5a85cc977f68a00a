"""The site finder: from a traced model to the places where adapters can join.

It reads the graph only: additions, convolutions, attention, and which module call each ran in. A :class:`Located`
pairs a site with its nodes in this very trace, for the splice that follows; the site alone outlives it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import fx, nn

from cadapt.graph.blocks import Block, BlockFinder
from cadapt.graph.branches import attention_span, branch_call, branch_kind, trim_branch
from cadapt.graph.convs import conv_of, fit_grid
from cadapt.graph.crossing import Crossings
from cadapt.graph.flow import immediate_dominators, sources_of
from cadapt.graph.geometry import functional_conv, layout_of, odd, usual_activation, window_of
from cadapt.graph.grids import Grids
from cadapt.graph.operators import module_of, shape_of
from cadapt.graph.residual import Residual, find_residuals
from cadapt.graph.scopes import find_scopes, plain_path
from cadapt.graph.traits import mark_traits
from cadapt.graph.units import Unit, call_of, find_units, stem_of
from cadapt.site import Layout, Site, SiteKind


@dataclass(frozen=True, kw_only=True)
class Located:
    """A site, and the nodes of one trace between which it lies."""

    site: Site
    input: fx.Node
    output: fx.Node


def locate_sites(graph: fx.Graph, model: nn.Module) -> tuple[Located, ...]:
    """Return the sites of a traced model with their nodes, in the order in which they run.

    Args:
        graph: a trace of ``model`` with its shapes recorded.
        model: the model, for the settings of its modules; it is not run.
    """
    return _Finder(graph, model).run()


def find_sites(graph: fx.Graph, model: nn.Module) -> tuple[Site, ...]:
    """Return the sites of a traced model whose shapes are recorded, in the order in which they run."""
    return tuple(located.site for located in locate_sites(graph, model))


class _Finder:
    """One pass over one graph; holds what all kinds of sites are told by."""

    def __init__(self, graph: fx.Graph, model: nn.Module) -> None:
        self.graph = graph
        self.model = model
        mark_traits(graph, model)
        dominators = immediate_dominators(graph)
        residuals = find_residuals(graph.nodes, dominators)
        scopes = find_scopes(graph)
        crossings = Crossings(graph, dominators, {item.add: item.shortcut_end for item in residuals})
        self.order = crossings.order
        self.crossings = crossings
        self.residuals = residuals
        self.units = find_units(graph, model, scopes, dominators, residuals)
        self.blocks = BlockFinder(
            model=model,
            scopes=scopes,
            crossings=crossings,
            residuals=residuals,
            units=self.units,
            stem=stem_of(self.units),
        ).run()
        self.scopes = scopes
        self.grids = Grids(graph)
        self.usual_activation = usual_activation(graph.nodes, model) or "relu"
        self.usual_window = self._usual_window()
        self.stage_of = _number_stages(self.blocks)
        self.passed = _passed_by_all(graph, dominators)

    def run(self) -> tuple[Located, ...]:
        found = [*self._blocks(), *self._convs(), *self._stages(), *self._branches(), *self._linears()]
        return tuple(sorted(found, key=lambda item: (self.order[item.output], item.site.kind)))

    def _blocks(self) -> Iterable[Located]:
        found = [located for block in self.blocks if (located := self._block_site(block)) is not None]
        yield from found
        on_grid = {node for located in found if located.site.grid for node in (located.input, located.output)}
        around: dict[str, Located] = {}
        for block in self.blocks:
            outer = self._on_grid_around(block) if not on_grid & {block.input, block.output} else None
            if outer is not None and not on_grid & {*outer.scope.nodes}:
                located = self._block_site(outer)
                if located is not None:
                    around[outer.scope.key] = located
        yield from around.values()

    def _block_site(self, block: Block) -> Located | None:
        layout = self._layout(block.input, block.scope.nodes)
        site = self._site("block", block.scope.path, block.scope.call, block.input, block.output, layout)
        if site is None:
            return None
        return Located(site=self._described(site, block), input=block.input, output=block.output)

    def _layout(self, start: fx.Node, nodes: Sequence[fx.Node]) -> Layout:
        """The layout of what nodes read; where they do not show it, by the picture's proportions."""
        layout = layout_of(start, nodes, self.model)
        other: Layout = "NHWC" if layout == "NCHW" else "NCHW"
        return other if not self.grids.find(start, layout) and self.grids.find(start, other) else layout

    def _on_grid_around(self, block: Block) -> Block | None:
        """The innermost module call around a block that goes from grid to grid: blocks of windows lie on none."""
        key = block.scope.parent
        while key is not None:
            scope = self.scopes[key]
            crossing = self.crossings.find(scope.nodes)
            layout = layout_of(crossing[0], scope.nodes, self.model) if crossing else "NCHW"
            if crossing and all(self.grids.find(node, layout) for node in crossing):
                return Block(scope=scope, input=crossing[0], output=crossing[1], operator=scope.kind.__name__)
            key = scope.parent
        return None

    def _described(self, site: Site, block: Block) -> Site:
        """A block's or stage's site with what is known of its functional conv or its attention."""
        site = replace(
            site,
            activation=usual_activation(block.scope.nodes, self.model) or self.usual_activation,
            operator=block.operator,
            stage=self.stage_of.get(block.scope.key),
        )
        conv = functional_conv(block, self.units)
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
        windows = (window_of(residual, site.grid, self.usual_window) for residual in block.residuals)
        window = next((item for item in windows if item is not None), None)
        return replace(site, kernel=window, padding=(window[0] // 2, window[1] // 2)) if window else site

    def _convs(self) -> Iterable[Located]:
        """Every conv unit behind the stem: those of blocks, those that join stages, those between streams."""
        owner = {node: block for block in self.blocks for node in block.scope.nodes}
        start = min((self.order[block.input] for block in self.blocks), default=len(self.order))
        last = max((self.order[block.output] for block in self.blocks), default=-1)
        projecting = {node for residual in self.residuals for node in residual.shortcut}
        for unit in self.units:
            block = owner.get(unit.output)
            if unit.output in projecting:
                continue
            if block is None and self.order[unit.input] < start:
                continue
            following = next((item for item in self.blocks if self.order[item.output] > self.order[unit.output]), None)
            joins = (
                block is None
                and max(unit.conv.stride) > 1
                and unit.output in self.passed
                and self.order[unit.output] < last
            )
            around = block or following
            stage = self.stage_of[around.scope.key] if around else None
            yield self._conv_site("downsample" if joins else "conv", unit, block, stage)

    def _conv_site(
        self, kind: Literal["conv", "downsample"], unit: Unit, block: Block | None, stage: int | None
    ) -> Located:
        layout = self._layout(unit.input, unit.nodes)
        site = self._site(kind, unit.path, unit.call, unit.input, unit.output, layout)
        assert site is not None, unit.path
        around = block.scope.nodes if block else ()
        site = replace(
            site,
            kernel=unit.conv.kernel,
            stride=unit.conv.stride,
            padding=unit.conv.padding,
            dilation=unit.conv.dilation,
            groups=unit.conv.groups,
            activation=usual_activation(around, self.model) or self.usual_activation,
            operator=unit.operator,
            stage=stage,
        )
        return Located(site=site, input=unit.input, output=unit.output)

    def _stages(self) -> Iterable[Located]:
        groups: dict[int, list[Block]] = {}
        for block in self.blocks:
            groups.setdefault(self.stage_of[block.scope.key], []).append(block)
        for stage, blocks in groups.items():
            start, end = blocks[0].input, blocks[-1].output
            layout = layout_of(start, blocks[0].scope.nodes, self.model)
            path = blocks[0].scope.parent or blocks[0].scope.path
            site = self._site("stage", plain_path(path), 0, start, end, layout)
            if site is not None:
                site = replace(self._described(site, blocks[0]), operator="", groups=1, stage=stage)
                yield Located(site=site, input=start, output=end)

    def _branches(self) -> Iterable[Located]:
        """Attention and MLP branches of blocks: from the norm that opens the branch to before its drop-path."""
        convolved = {node for unit in self.units for node in unit.nodes}
        for block in self.blocks:
            for residual in block.residuals:
                kind = branch_kind(residual, self.model, convolved)
                if kind is not None:
                    located = self._branch_site(kind, block, residual)
                    if located is not None:
                        yield located

    def _branch_site(self, kind: Literal["attention", "mlp"], block: Block, residual: Residual) -> Located | None:
        start, end = trim_branch(residual, self.model)
        key = branch_call(kind, block, residual, self.model)
        if kind == "attention":
            start, end = attention_span(residual, self.scopes.get(key or ""), self.crossings, self.model)
        path = plain_path(key) if key else f"{block.scope.path}.{kind}"
        layout = layout_of(start, residual.branch, self.model)
        site = self._site(kind, path, block.scope.call, start, end, layout)
        if site is None:
            return None
        window = window_of(residual, site.grid, self.usual_window) if kind == "attention" else None
        activation = usual_activation(block.scope.nodes, self.model) or self.usual_activation
        padding = (window[0] // 2, window[1] // 2) if window else (0, 0)
        site = replace(
            site, kernel=window, padding=padding, activation=activation, stage=self.stage_of[block.scope.key]
        )
        return Located(site=site, input=start, output=end)

    def _usual_window(self) -> int:
        """The side of the largest attention window in the model, 0 where none attends in windows."""
        sides = [0]
        for block in self.blocks:
            for residual in block.residuals:
                layout = layout_of(residual.start, residual.branch, self.model)
                grid = self.grids.find(residual.start, layout)
                window = window_of(residual, grid.size if grid else None)
                sides.append(max(window) if window else 0)
        return max(sides)

    def _linears(self) -> Iterable[Located]:
        for block in self.blocks:
            for node in block.scope.nodes:
                located = self._linear_site(node, self.stage_of[block.scope.key])
                if located is not None:
                    yield located

    def _linear_site(self, node: fx.Node, stage: int) -> Located | None:
        """A linear layer's or a 1×1 conv's site, where the node calls one on something that depends on the input."""
        module, conv, sources = module_of(node, self.model), conv_of(node, self.model), sources_of(node)
        layout: Layout = "NCHW"
        if isinstance(module, nn.Linear):
            layout = "NHWC" if len(shape_of(node) or ()) == 4 else "NLC"
        elif conv is None or conv.is_wide:
            return None
        site = self._site("linear", str(node.target), call_of(node), sources[0], node, layout) if sources else None
        if site is None:
            return None
        site = replace(
            site,
            kernel=(1, 1),
            stride=conv.stride if conv else (1, 1),
            groups=conv.groups if conv else 1,
            operator=type(module).__name__,
            stage=stage,
        )
        return Located(site=site, input=sources[0], output=node)

    def _site(self, kind: SiteKind, path: str, call: int, start: fx.Node, end: fx.Node, layout: Layout) -> Site | None:
        before, after = shape_of(start), shape_of(end)
        if before is None or after is None or len(before) != len(after):
            return None
        if len(before) == 2:
            layout = "NC"
        grid, out_grid = self.grids.find(start, layout), self.grids.find(end, layout)
        if grid and out_grid and grid.prefix != out_grid.prefix:
            grid = out_grid = None
        stride = (1, 1)
        if grid and out_grid:
            stride = (max(1, round(grid.size[0] / out_grid.size[0])), max(1, round(grid.size[1] / out_grid.size[1])))
        return Site(
            path=path,
            kind=kind,
            in_shape=before[1:],
            out_shape=after[1:],
            layout=layout,
            grid=grid.size if grid and out_grid else None,
            out_grid=out_grid.size if grid and out_grid and layout == "NLC" else None,
            prefix_tokens=grid.prefix if grid and out_grid else 0,
            stride=stride,
            call=call,
        )


def _passed_by_all(graph: fx.Graph, dominators: Mapping[fx.Node, fx.Node]) -> set[fx.Node]:
    """The nodes that every path from the input to the output passes."""
    node = next(iter(reversed(graph.nodes))).all_input_nodes[0]
    passed = {node}
    while node in dominators:
        node = dominators[node]
        passed.add(node)
    return passed


def _number_stages(blocks: Sequence[Block]) -> dict[str, int]:
    """Number runs of blocks that share their parent and their output's grid."""
    numbers: dict[str, int] = {}
    previous: tuple[str | None, tuple[int, ...]] | None = None
    stage = -1
    for block in blocks:
        mark = (block.scope.parent, (shape_of(block.output) or ())[2:])
        stage += mark != previous
        previous = mark
        numbers[block.scope.key] = stage
    return numbers
