"""The site finder: from a traced model to the places where adapters can join.

It reads the graph only: additions, convolutions, attention, and which module call each ran in. A :class:`Located`
pairs a site with its nodes in this very trace, for the splice that follows; the site alone outlives it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import fx, nn

from cadapt.graph.blocks import Block, find_blocks, find_units
from cadapt.graph.flow import mark_flow, sources_of
from cadapt.graph.operators import (
    GATES,
    activation_of,
    conv_of,
    function_name,
    is_attention,
    is_linear,
    is_norm,
    module_of,
    shape_of,
)
from cadapt.graph.residual import Residual, find_residuals
from cadapt.graph.scopes import find_scopes, stack_of
from cadapt.site import Layout, Pair, Site, SiteKind


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
        self.usual_activation = _usual_activation(graph.nodes, model) or "relu"
        self.stage_of = _number_stages(self.blocks)

    def run(self) -> tuple[Located, ...]:
        found = [*self._blocks(), *self._convs(), *self._downsamples(), *self._stages()]
        found += [*self._branches(), *self._linears()]
        return tuple(sorted(found, key=lambda item: (self.order[item.output], item.site.kind)))

    def _blocks(self) -> Iterable[Located]:
        for block in self.blocks:
            kernel, dilation, groups = _functional_geometry(block, self.model)
            layout = _layout_of(block.input, block.scope.nodes, self.model)
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
                activation=_usual_activation(block.scope.nodes, self.model) or self.usual_activation,
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
            kernel=_pair(conv.kernel_size),
            stride=_pair(conv.stride),
            padding="same" if same else _pair(conv.padding),
            dilation=_pair(conv.dilation),
            groups=conv.groups,
            activation=_usual_activation(around, self.model) or self.usual_activation,
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
            layout = _layout_of(start, blocks[0].scope.nodes, self.model)
            path = blocks[0].scope.parent or blocks[0].scope.path
            site = self._site("stage", _plain(path), 0, start, end, layout)
            if site is not None:
                kernel, dilation, _ = _functional_geometry(blocks[0], self.model)
                site = replace(site, kernel=kernel, dilation=dilation, stage=stage, activation=self.usual_activation)
                yield Located(site=site, input=start, output=end)

    def _branches(self) -> Iterable[Located]:
        """Attention and MLP branches of blocks: from the norm that opens the branch to before its drop-path."""
        for block in self.blocks:
            for residual in block.residuals:
                kind = _branch_kind(residual, self.model)
                if kind is not None:
                    located = self._branch_site(kind, block, residual)
                    if located is not None:
                        yield located

    def _branch_site(self, kind: Literal["attention", "mlp"], block: Block, residual: Residual) -> Located | None:
        start, end = _trim(residual, self.model)
        path = _branch_path(kind, block, residual, self.model)
        layout = _layout_of(start, residual.branch, self.model)
        site = self._site(kind, path, block.scope.call, start, end, layout)
        if site is None:
            return None
        window = _window(residual, self.model, site.grid) if kind == "attention" else None
        activation = _usual_activation(block.scope.nodes, self.model) or self.usual_activation
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
                    stride=_pair(getattr(module, "stride", 1)),
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
        grid, out_grid = _grid(before[1:], layout), _grid(after[1:], layout)
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


def _pair(value: Any) -> Pair:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _odd(kernel: Pair) -> Pair:
    """The largest odd kernel within: only that keeps a block's grid with padding on both sides."""
    return kernel[0] - 1 + kernel[0] % 2, kernel[1] - 1 + kernel[1] % 2


def _plain(key: str) -> str:
    return key.partition("@")[0]


def _call_of(node: fx.Node) -> int:
    key = next(reversed(stack_of(node)), "")
    return int(key.rpartition("@")[2]) if "@" in key else 0


def _grid(shape: tuple[int, ...], layout: Layout) -> Pair | None:
    if layout == "NCHW" and len(shape) == 3:
        return shape[1], shape[2]
    return (shape[0], shape[1]) if layout == "NHWC" and len(shape) == 3 else None


def _usual_activation(nodes: Iterable[fx.Node], model: nn.Module) -> str | None:
    """The most frequent non-linearity; gates and softmax are none."""
    names = Counter(activation_of(node, model) for node in nodes)
    usual = [(count, name) for name, count in names.items() if name is not None and name not in GATES]
    return max(usual, key=lambda item: item[0])[1] if usual else None


def _functional_geometry(block: Block, model: nn.Module) -> tuple[Pair | None, Pair, int]:
    """Kernel, dilation and groups of the block's functional conv, or its attention window as a kernel."""
    convs = [conv for node in block.scope.nodes if (conv := conv_of(node, model)) and max(conv.kernel_size) > 1]
    if convs:
        widest = max(convs, key=lambda conv: max(conv.kernel_size))
        return _odd(_pair(widest.kernel_size)), _pair(widest.dilation), widest.groups
    shape = shape_of(block.input)
    grid = _grid(shape[1:], "NHWC") if shape and len(shape) == 4 else None
    for residual in block.residuals:
        window = _window(residual, model, grid)
        if window is not None:
            return window, (1, 1), 1
    return None, (1, 1), 1


def _window(residual: Residual, model: nn.Module, grid: Pair | None) -> Pair | None:
    """The side of a windowed attention's window, made odd: from how many tokens attend to each other."""
    if grid is None or not residual.has_attention:
        return None
    for node in residual.branch:
        if is_attention(node, model):
            shape = shape_of(node) or (0,)
            queries = shape[-2]
            side = math.isqrt(queries)
            if side > 1 and side * side == queries:
                return _odd((side, side))
    return None


def _layout_of(start: fx.Node, nodes: Sequence[fx.Node], model: nn.Module) -> Layout:
    """Tell channels-first from channels-last by the first module that mixes or normalises channels."""
    shape = shape_of(start) or ()
    if len(shape) == 3:
        return "NLC"
    if _mixes_last(start, model):
        return "NHWC"
    inside, frontier, seen = set(nodes), [start], set()
    while frontier:
        node = frontier.pop(0)
        for user in node.users:
            if user not in inside or user in seen:
                continue
            seen.add(user)
            if _mixes_last(user, model):
                return "NHWC"
            to_last = function_name(user) == "permute" and user.args[1:] == (0, 2, 3, 1)
            if conv_of(user, model) is not None or is_norm(user, model) or to_last:
                return "NCHW"
            frontier.append(user)
    return "NCHW"


def _mixes_last(node: fx.Node, model: nn.Module) -> bool:
    """Whether a node mixes or normalises the last dimension."""
    if is_linear(node, model) or function_name(node) in ("layer_norm", "rms_norm"):
        return True
    return isinstance(module_of(node, model), nn.LayerNorm | nn.RMSNorm)


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


def _branch_kind(residual: Residual, model: nn.Module) -> Literal["attention", "mlp"] | None:
    if residual.has_attention:
        return "attention"
    linears = sum(is_linear(node, model) for node in residual.branch)
    return "mlp" if linears >= 2 and not residual.has_conv else None


def _trim(residual: Residual, model: nn.Module) -> tuple[fx.Node, fx.Node]:
    """Step over the norm that opens a branch, and back over the layer scale and drop-path that close it."""
    inside = set(residual.branch)
    start = residual.start
    opening = [user for user in start.users if user in inside and is_norm(user, model)]
    if len(opening) == 1:
        start = opening[0]
    end = residual.branch_end
    while end in inside and _is_closing(end, model):
        end = sources_of(end)[0]
    return start, end


def _is_closing(node: fx.Node, model: nn.Module) -> bool:
    module = module_of(node, model)
    if module is not None:
        name = type(module).__name__.lower()
        return isinstance(module, nn.Identity | nn.Dropout) or "droppath" in name or "layerscale" in name
    # layer scale, traced to its multiplication by a parameter
    return (
        function_name(node) == "mul"
        and len(sources_of(node)) == 1
        and any(source.op == "get_attr" for source in node.all_input_nodes)
    )


def _branch_path(kind: str, block: Block, residual: Residual, model: nn.Module) -> str:
    """The module under the block that does the branch's work: ``blocks.0.attn``."""
    does = is_attention if kind == "attention" else is_linear
    for node in sorted(residual.branch, key=lambda item: item.name):
        if does(node, model):
            keys = list(stack_of(node))
            below = keys[keys.index(block.scope.key) + 1 :] if block.scope.key in keys else []
            if below:
                return _plain(below[0])
    return f"{block.scope.path}.{kind}"
