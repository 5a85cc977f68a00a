"""What is known of one traced model: its blocks, its conv units, its grids. All kinds of sites are told from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from cadapt.graph.blocks import Block, BlockFinder
from cadapt.graph.crossing import Crossings
from cadapt.graph.flow import immediate_dominators
from cadapt.graph.geometry import layout_of, usual_activation, window_of
from cadapt.graph.grids import Grid, Grids
from cadapt.graph.operators import shape_of
from cadapt.graph.residual import find_residuals
from cadapt.graph.scopes import find_scopes
from cadapt.graph.traits import mark_traits
from cadapt.graph.units import find_units, stem_of
from cadapt.site import Layout, Site, SiteKind


@dataclass(frozen=True, kw_only=True)
class Located:
    """A site, and the nodes of one trace between which it lies.

    ``joint`` is where a bypass joins: behind the layer scale that closes a branch, before its drop-path; None where
    that is the output itself.
    """

    site: Site
    input: fx.Node
    output: fx.Node
    joint: fx.Node | None = None


class Anatomy:
    """One pass over a graph with recorded shapes.

    ``order`` numbers the nodes; ``passed`` are those that every path from the input to the output passes; ``stage_of``
    numbers the stage of a block by its scope's key; ``usual_window`` is the side of the largest attention window.
    """

    def __init__(self, graph: fx.Graph, model: nn.Module) -> None:
        self.model = model
        mark_traits(graph, model)
        dominators = immediate_dominators(graph)
        self.residuals = find_residuals(graph.nodes, dominators)
        self.scopes = find_scopes(graph)
        self.crossings = Crossings(graph, dominators, {item.add: item.shortcut_end for item in self.residuals})
        self.order = self.crossings.order
        self.units = find_units(graph, model, self.scopes, dominators, self.residuals)
        self.blocks = BlockFinder(
            model=model,
            scopes=self.scopes,
            crossings=self.crossings,
            residuals=self.residuals,
            units=self.units,
            stem=stem_of(self.units),
        ).run()
        self.grids = Grids(graph, dominators)
        self.usual_activation = usual_activation(graph.nodes, model) or "relu"
        self.usual_window = self._usual_window()
        self.stage_of = _number_stages(self.blocks)
        self.passed = _passed_by_all(graph, dominators)

    def site(self, kind: SiteKind, path: str, call: int, start: fx.Node, end: fx.Node, layout: Layout) -> Site | None:
        """The place between two tensors, or None where they are of different ranks."""
        before, after = shape_of(start), shape_of(end)
        if before is None or after is None or len(before) != len(after):
            return None
        if len(before) == 2:
            layout = "NC"
        grid = self.grids.find(start, layout)
        out_grid = self.grids.find(end, layout, inside_branch=kind in ("attention", "mlp"))
        if kind in ("conv", "downsample") and layout == "NCHW":
            # a conv reads a map whatever its proportions
            grid, out_grid = Grid(size=(before[2], before[3])), Grid(size=(after[2], after[3]))
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

    def activation(self, nodes: Iterable[fx.Node]) -> str:
        """The usual non-linearity among some nodes, else the model's."""
        return usual_activation(nodes, self.model) or self.usual_activation

    def layout(self, start: fx.Node, nodes: Sequence[fx.Node]) -> Layout:
        """The layout of what nodes read; where they do not show it, by the picture's proportions."""
        layout = layout_of(start, nodes, self.model)
        other: Layout = "NHWC" if layout == "NCHW" else "NCHW"
        return other if not self.grids.find(start, layout) and self.grids.find(start, other) else layout

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
