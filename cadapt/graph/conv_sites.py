"""Conv units and linear layers as sites: what the ``conv-`` schemes adapt, and what others fold into."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

from torch import fx, nn

from cadapt.graph.anatomy import Anatomy, Located
from cadapt.graph.blocks import Block
from cadapt.graph.convs import conv_of
from cadapt.graph.flow import sources_of
from cadapt.graph.operators import function_name, shape_of
from cadapt.graph.units import Unit, call_of
from cadapt.site import Layout


def conv_sites(anatomy: Anatomy) -> Iterable[Located]:
    """Every conv unit behind the stem: those of blocks, those that join stages, those between streams."""
    blocks, order = anatomy.blocks, anatomy.order
    owner = {node: block for block in blocks for node in block.scope.nodes}
    start = min((order[block.input] for block in blocks), default=len(order))
    projecting = {node for residual in anatomy.residuals for node in residual.shortcut}
    for unit in anatomy.units:
        block = owner.get(unit.output)
        if unit.output in projecting or (block is None and order[unit.input] < start):
            continue
        following = next((item for item in blocks if order[item.output] > order[unit.output]), None)
        on_the_way = block is None and following is not None and unit.output in anatomy.passed
        around = block or following
        stage = anatomy.stage_of[around.scope.key] if around else None
        joins = on_the_way and max(unit.conv.stride) > 1
        yield _conv_site(anatomy, "downsample" if joins else "conv", unit, block, stage)


def _conv_site(
    anatomy: Anatomy, kind: Literal["conv", "downsample"], unit: Unit, block: Block | None, stage: int | None
) -> Located:
    layout = anatomy.layout(unit.input, unit.nodes)
    site = anatomy.site(kind, unit.path, unit.call, unit.input, unit.output, layout)
    assert site is not None, unit.path
    around = block.scope.nodes if block else ()
    site = replace(
        site,
        kernel=unit.conv.kernel,
        stride=unit.conv.stride,
        padding=unit.conv.padding,
        dilation=unit.conv.dilation,
        groups=unit.conv.groups,
        padding_mode=unit.conv.padding_mode,
        activation=anatomy.activation(around),
        operator=unit.operator,
        stage=stage,
    )
    return Located(site=site, input=unit.input, output=unit.output)


def linear_sites(anatomy: Anatomy) -> Iterable[Located]:
    """Every linear layer and 1×1 conv of a block."""
    calls = number_reads(anatomy)
    for block in anatomy.blocks:
        for node in block.scope.nodes:
            located = _linear_site(anatomy, node, calls.get(node, 0), anatomy.stage_of[block.scope.key])
            if located is not None:
                yield located


def _linear_site(anatomy: Anatomy, node: fx.Node, read: int, stage: int) -> Located | None:
    """A linear layer's or a 1×1 conv's site, where the node calls one on something that depends on the input."""
    path = owner_of(node, anatomy.model)
    conv, sources = conv_of(node, anatomy.model), sources_of(node)
    module = None if path is None else anatomy.model.get_submodule(path)
    layout: Layout = "NCHW"
    if isinstance(module, nn.Linear):
        layout = "NHWC" if len(shape_of(node) or ()) == 4 else "NLC"
    elif conv is None or conv.is_wide:
        return None
    call = call_of(node) if node.op == "call_module" else read
    site = anatomy.site("linear", path or str(node.target), call, sources[0], node, layout) if sources else None
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


def number_reads(anatomy: Anatomy) -> dict[fx.Node, int]:
    """Which use of a layer's weight a multiplication is that the base does itself."""
    seen: Counter[str] = Counter()
    numbers = {}
    for node in anatomy.order:
        path = owner_of(node, anatomy.model) if node.op == "call_function" else None
        if path is not None:
            numbers[node] = seen[path]
            seen[path] += 1
    return numbers


def owner_of(node: fx.Node, model: nn.Module) -> str | None:
    """The path of the layer a node calls, or whose weight it multiplies with itself (Swin-v2's qkv)."""
    if node.op == "call_module":
        return str(node.target)
    if function_name(node) != "linear":
        return None
    weights = [item for item in node.all_input_nodes if item.op == "get_attr" and str(item.target).endswith(".weight")]
    paths = [str(item.target).removesuffix(".weight") for item in weights]
    return next((path for path in paths if isinstance(model.get_submodule(path), nn.Linear)), None)
