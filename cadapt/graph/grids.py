"""The grid that a tensor's places lie on: read from a map's shape, or, for tokens, from the maps around them.

Tokens ``[B, L, C]`` do not say how they lie on the picture. The map that they were flattened from does: the nearest
one before them with as many places, but for a few prefix tokens (class token, registers, distillation).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from cadapt.graph.flow import immediate_dominators
from cadapt.graph.operators import CONCATENATIONS, function_name, shape_of
from cadapt.site import Layout, Pair

_MOST_PREFIX_TOKENS = 8
_REORDERING = frozenset({"flip", "roll", "fliplr", "flipud", "rot90"})
_TURNS = frozenset({"transpose", "permute", "swapaxes", "mT"})


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Height and width, and how many tokens precede the grid's."""

    size: Pair
    prefix: int = 0


class Grids:
    """Tells grids in one graph with recorded shapes."""

    def __init__(self, graph: fx.Graph, dominators: Mapping[fx.Node, fx.Node] | None = None) -> None:
        self.dominators = immediate_dominators(graph) if dominators is None else dominators
        self.nodes = [node for node in graph.nodes if node.meta["from_input"]]
        self.order = {node: index for index, node in enumerate(self.nodes)}
        first = shape_of(self.nodes[0]) or (1, 1, 1, 1)
        self.batch, self.aspect = first[0], first[2] / first[3]

    def find(self, node: fx.Node, layout: Layout, *, inside_branch: bool = False) -> Grid | None:
        """The grid of a node's places, or None where it has none, or none that is known.

        The end of a residual branch lies as the shortcut that it is added to, whatever windows it was cut into.
        """
        shape = shape_of(node) or ()
        if len(shape) == 4:
            size = (shape[2], shape[3]) if layout == "NCHW" else (shape[1], shape[2])
            laid_out = self._resembles_picture(size) and (
                layout == "NCHW" or inside_branch or self._in_raster_order(node)
            )
            return Grid(size=size) if laid_out else None
        if len(shape) != 3 or shape[0] != self.batch or not (inside_branch or self._in_raster_order(node)):
            return None
        index = self.order[node]
        found = self._match(reversed(self.nodes[:index]), shape[1], shape[2])
        if found is None:
            # where tokens were pooled no map has their width: then the nearest of the right size
            near = sorted(self.nodes, key=lambda other: abs(self.order[other] - index))
            found = self._match(near, shape[1], None) or self._pooled(index, shape[1])
        return found

    def _in_raster_order(self, node: fx.Node) -> bool:
        """Whether places lie as on the map they come from: not cut into windows, turned, or with others before them.

        Told from what all paths to them pass, back to the last map: windows inside a branch are its own affair. A
        concatenation puts the prefix first; a flattened map of channels first must have been turned once. Cutting
        that leaves another width is a merging of patches, and that keeps the order.
        """
        rank, turns = len(shape_of(node) or ()), 0
        width: int | None = None
        while node in self.dominators:
            shape, source = shape_of(node) or (), self.dominators[node]
            before = shape_of(source) or ()
            if 0 < len(shape) <= 4 < len(before):
                width = shape[-1]
            elif 0 < len(before) <= 4 < len(shape) and width in (before[1:2] + before[-1:]):
                return False
            folded = bool(shape and before) and shape[0] != before[0]  # windows, counted with the batch
            if folded or function_name(node) in _REORDERING or _appends(node):
                return False
            turns += len(shape) == 3 and function_name(node) in _TURNS
            if rank == 3 == len(shape) and len(before) == 4:
                return self._flattened_right(before, shape, turns)
            node = source
        return True

    @staticmethod
    def _flattened_right(before: tuple[int, ...], shape: tuple[int, ...], turns: int) -> bool:
        channels_first = before[1] * before[2] * before[3] == shape[1] * shape[2] and shape[1] == before[1]
        channels_last = shape[2] == before[3] and shape[1] == before[1] * before[2]
        if channels_first and not channels_last:
            return turns % 2 == 1
        return True

    def _pooled(self, index: int, tokens: int) -> Grid | None:
        """The grid of tokens that were picked from a known one, every second or fourth (LeViT)."""
        for node in reversed(self.nodes[:index]):
            for size, _ in _readings(shape_of(node) or ()):
                for step in (2, 3, 4):
                    rows, columns = -(-size[0] // step), -(-size[1] // step)
                    if rows * columns == tokens and min(rows, columns) > 1 and self._resembles_picture(size):
                        return Grid(size=(rows, columns))
        return None

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


def _appends(node: fx.Node) -> bool:
    """Whether a node puts a few tokens behind many."""
    shape = shape_of(node) or ()
    if function_name(node) not in CONCATENATIONS or len(shape) != 3 or not node.args:
        return False
    operands = node.args[0]
    last = shape_of(operands[-1]) if isinstance(operands, list | tuple) and isinstance(operands[-1], fx.Node) else None
    return last is not None and len(last) == 3 and last[2] == shape[2] and 2 * last[1] < shape[1]


def _readings(shape: tuple[int, ...]) -> Iterator[tuple[Pair, int]]:
    """The grid and width of a tensor of four dimensions, read channels first and channels last."""
    if len(shape) == 4:
        yield (shape[2], shape[3]), shape[1]
        yield (shape[1], shape[2]), shape[3]
