"""The site finder: from a traced model to the places where adapters can join.

It reads the graph only: additions, convolutions, attention, and which module call each ran in. A :class:`Located`
pairs a site with its nodes in this very trace, for the splice that follows; the site alone outlives it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import fx, nn

from cadapt.graph.blocks import Block, find_blocks, find_units
from cadapt.graph.branches import branch_kind, branch_path, trim_branch
from cadapt.graph.flow import mark_flow, sources_of
from cadapt.graph.geometry import functional_geometry, grid_of, layout_of, pair, usual_activation, window_of
from cadapt.graph.operators import conv_of, module_of, shape_of
from cadapt.graph.residual import Residual, find_residuals
from cadapt.graph.scopes import find_scopes, plain_path, stack_of
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
        mark_flow(graph)
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self.scopes = find_scopes(graph)
        self.blocks = find_blocks(graph, model, self.scopes, find_residuals(graph, model))
        self.usual_activation = usual_activation(graph.nodes, model) or "relu"
        self.stage_of = _number_stages(self.blocks)

    def run(self) -> tuple[Located, ...]:
        found = [*self._blocks(), *self._convs(), *self._downsamples(), *self._stages()]
        found += [*self._branches(), *self._linears()]
        return tuple(sorted(found, key=lambda item: (self.order[item.output], item.site.kind)))

    def _blocks(self) -> Iterable[Located]:
        for block in self.blocks:
            kernel, dilation, groups = functional_geometry(block, self.model)
            layout = layout_of(block.input, block.scope.nodes, self.model)
            site = self._site("block", block.scope.path, block.scope.call, block.input, block.output, layout)
            if site is None:
                continue
            padding = None if kernel is None else (dilation[0] * (kernel[0] // 2), dilation[1] * (kernel[1] // 2))
            site = replace(
                site,
                kernel=kernel,
                dilation=dilation,
                padding=padding or (0, 0),
                groups=groups,
                stage=self.stage_of[block.scope.key],
                activation=usual_activation(block.scope.nodes, self.model) or self.usual_activation,
                operator=block.scope.kind.__name__,
            )
            yield Located(site=site, input=block.input, output=block.output)

    def _convs(self) -> Iterable[Located]:
        owner = {node: block for block in self.blocks for node in block.scope.nodes}
        units = set() if self.blocks else set(find_units(self.graph, self.model))
        for node in self.graph.nodes:
            conv = conv_of(node, self.model)
            if conv is None or max(conv.kernel_size) == 1 or not (node in owner or node in units):
                continue
            block = owner.get(node)
            scope_nodes = block.scope.nodes if block else ()
            yield self._conv_site("conv", node, conv, scope_nodes, self.stage_of[block.scope.key] if block else None)

    def _downsamples(self) -> Iterable[Located]:
        if not self.blocks:
            return
        inside = {node for block in self.blocks for node in block.scope.nodes}
        first, last = self.order[self.blocks[0].output], self.order[self.blocks[-1].output]
        for node in self.graph.nodes:
            conv = conv_of(node, self.model)
            if conv is None or node in inside or not first < self.order[node] < last:
                continue
            if max(conv.kernel_size) > 1 and max(conv.stride) > 1:
                following = next(block for block in self.blocks if self.order[block.output] > self.order[node])
                yield self._conv_site("downsample", node, conv, (), self.stage_of[following.scope.key])

    def _conv_site(
        self, kind: SiteKind, node: fx.Node, conv: nn.Conv2d, around: Sequence[fx.Node], stage: int | None
    ) -> Located:
        source = sources_of(node)[0]
        site = self._site(kind, str(node.target), _call_of(node), source, node, "NCHW")
        assert site is not None, node
        same = isinstance(conv.padding, str) or "Same" in type(conv).__name__
        site = replace(
            site,
            kernel=pair(conv.kernel_size),
            stride=pair(conv.stride),
            padding="same" if same else pair(conv.padding),
            dilation=pair(conv.dilation),
            groups=conv.groups,
            activation=usual_activation(around, self.model) or self.usual_activation,
            operator=type(conv).__name__,
            stage=stage,
        )
        return Located(site=site, input=source, output=node)

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
                kernel, dilation, _ = functional_geometry(blocks[0], self.model)
                site = replace(site, kernel=kernel, dilation=dilation, stage=stage, activation=self.usual_activation)
                yield Located(site=site, input=start, output=end)

    def _branches(self) -> Iterable[Located]:
        """Attention and MLP branches of blocks: from the norm that opens the branch to before its drop-path."""
        for block in self.blocks:
            for residual in block.residuals:
                kind = branch_kind(residual, self.model)
                if kind is not None:
                    located = self._branch_site(kind, block, residual)
                    if located is not None:
                        yield located

    def _branch_site(self, kind: Literal["attention", "mlp"], block: Block, residual: Residual) -> Located | None:
        start, end = trim_branch(residual, self.model)
        path = branch_path(kind, block, residual, self.model)
        layout = layout_of(start, residual.branch, self.model)
        site = self._site(kind, path, block.scope.call, start, end, layout)
        if site is None:
            return None
        window = window_of(residual, self.model, site.grid) if kind == "attention" else None
        activation = usual_activation(block.scope.nodes, self.model) or self.usual_activation
        padding = (window[0] // 2, window[1] // 2) if window else (0, 0)
        site = replace(
            site, kernel=window, padding=padding, activation=activation, stage=self.stage_of[block.scope.key]
        )
        return Located(site=site, input=start, output=end)

    def _linears(self) -> Iterable[Located]:
        for block in self.blocks:
            for node in block.scope.nodes:
                module = module_of(node, self.model)
                if isinstance(module, nn.Linear):
                    layout: Layout = "NHWC" if len(shape_of(node) or ()) == 4 else "NLC"
                elif isinstance(module, nn.Conv2d) and max(module.kernel_size) == 1:
                    layout = "NCHW"
                else:
                    continue
                source = sources_of(node)[0]
                site = self._site("linear", str(node.target), _call_of(node), source, node, layout)
                if site is None:
                    continue
                site = replace(
                    site,
                    kernel=(1, 1),
                    stride=pair(getattr(module, "stride", 1)),
                    groups=int(getattr(module, "groups", 1)),
                    operator=type(module).__name__,
                    stage=self.stage_of[block.scope.key],
                )
                yield Located(site=site, input=source, output=node)

    def _site(self, kind: SiteKind, path: str, call: int, start: fx.Node, end: fx.Node, layout: Layout) -> Site | None:
        before, after = shape_of(start), shape_of(end)
        if before is None or after is None or len(before) != len(after):
            return None
        if len(before) == 2:
            layout = "NC"
        grid, out_grid = grid_of(before[1:], layout), grid_of(after[1:], layout)
        stride = (1, 1)
        if grid and out_grid:
            stride = (math.ceil(grid[0] / out_grid[0]), math.ceil(grid[1] / out_grid[1]))
        return Site(
            path=path,
            kind=kind,
            in_shape=before[1:],
            out_shape=after[1:],
            layout=layout,
            grid=grid,
            stride=stride,
            call=call,
        )


def _call_of(node: fx.Node) -> int:
    key = next(reversed(stack_of(node)), "")
    return int(key.rpartition("@")[2]) if "@" in key else 0


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
