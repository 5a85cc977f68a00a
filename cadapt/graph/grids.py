"""The grid that a tensor's places lie on: read from a map's shape, or, for tokens, from the maps around them.

Tokens ``[B, L, C]`` do not say how they lie on the picture. The map that they were flattened from does: the nearest
one before them with as many places, but for a few prefix tokens (class token, registers, distillation).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import fx

from cadapt.graph.operators import shape_of
from cadapt.site import Layout, Pair

_MOST_PREFIX_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Height and width, and how many tokens precede the grid's."""

    size: Pair
    prefix: int = 0


class Grids:
    """Tells grids in one graph with recorded shapes."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = [node for node in graph.nodes if node.meta["from_input"]]
        self.order = {node: index for index, node in enumerate(self.nodes)}
        first = shape_of(self.nodes[0]) or (1, 1, 1, 1)
        self.batch, self.aspect = first[0], first[2] / first[3]

    def find(self, node: fx.Node, layout: Layout) -> Grid | None:
        """The grid of a node's places, or None where it has none, or none that is known."""
        shape = shape_of(node) or ()
        if len(shape) == 4:
            size = (shape[2], shape[3]) if layout == "NCHW" else (shape[1], shape[2])
            return Grid(size=size) if self._resembles_picture(size) else None
        if len(shape) != 3 or shape[0] != self.batch:
            return None
        index = self.order[node]
        before = reversed(self.nodes[:index])
        near = sorted(self.nodes, key=lambda other: abs(self.order[other] - index))
        # where tokens were pooled no map has their width: then the nearest of the right size
        return self._match(before, shape[1], shape[2]) or self._match(near, shape[1], None)

    def _match(self, nodes: Iterable[fx.Node], tokens: int, channels: int | None) -> Grid | None:
        """The grid of the first map with those channels and as many places as tokens, or a few less."""
        for node in nodes:
            for size, width in _readings(shape_of(node) or ()):
                prefix = tokens - size[0] * size[1]
                fits = width == channels or (channels is None and min(size) > 1)
                if fits and 0 <= prefix <= _MOST_PREFIX_TOKENS and self._resembles_picture(size):
                    return Grid(size=size, prefix=prefix)
        return None

    def _resembles_picture(self, size: Pair) -> bool:
        """Whether a grid has the picture's proportions, which windows of tokens and heads of channels have not."""
        return abs(size[0] - self.aspect * size[1]) <= 1


def _readings(shape: tuple[int, ...]) -> Iterator[tuple[Pair, int]]:
    """The grid and width of a tensor of four dimensions, read channels first and channels last."""
    if len(shape) == 4:
        yield (shape[2], shape[3]), shape[1]
        yield (shape[1], shape[2]), shape[3]
