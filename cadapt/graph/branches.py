"""Attention and MLP branches of blocks: what a residual branch does, and where its work begins and ends."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import replace
from typing import Literal

from torch import fx, nn

from cadapt.graph.anatomy import Anatomy, Located
from cadapt.graph.blocks import Block
from cadapt.graph.crossing import Crossings
from cadapt.graph.flow import sources_of
from cadapt.graph.geometry import window_of
from cadapt.graph.operators import function_name, is_attention, is_linear, is_norm, module_of, shape_of
from cadapt.graph.residual import Residual
from cadapt.graph.scopes import Scope, plain_path, stack_of
from cadapt.graph.traits import traits_of


def branch_kind(
    residual: Residual, model: nn.Module, convolved: Container[fx.Node]
) -> Literal["attention", "mlp"] | None:
    """Whether a branch attends, is two linear layers or more, or is something else.

    A branch with a functional conv, one of the nodes ``convolved``, is that conv's, whatever attends behind it.
    """
    if residual.has_attention:
        return None if any(node in convolved for node in residual.branch) else "attention"
    linears = sum(is_linear(node, model) for node in residual.branch)
    return "mlp" if linears >= 2 and not residual.has_conv else None


def trim_branch(residual: Residual, model: nn.Module) -> tuple[fx.Node, fx.Node]:
    """Step over the norm that opens a branch, and back over the layer scale and drop-path that close it."""
    inside = set(residual.branch)
    start = residual.start
    opening = [user for user in start.users if user in inside and is_norm(user, model)]
    if len(opening) == 1:
        start = opening[0]
    end = residual.branch_end
    while end in inside and (_drops(end, model) or _scales(end, model)):
        end = sources_of(end)[0]
    return start, end


def joint_of(residual: Residual, model: nn.Module) -> fx.Node:
    """What a branch gives before its drop-path: the end of its layer scale, where it has one."""
    inside, end = set(residual.branch), residual.branch_end
    while end in inside and _drops(end, model):
        end = sources_of(end)[0]
    return end


def _drops(node: fx.Node, model: nn.Module) -> bool:
    """Whether a node is a drop-path, a dropout or what stands in for one."""
    module = module_of(node, model)
    return isinstance(module, nn.Identity | nn.Dropout) or "droppath" in type(module).__name__.lower()


def _scales(node: fx.Node, model: nn.Module) -> bool:
    """Whether a node is a layer scale: a module, or traced to its multiplication by a parameter."""
    if module_of(node, model) is not None:
        return "layerscale" in type(module_of(node, model)).__name__.lower()
    return (
        function_name(node) == "mul"
        and len(sources_of(node)) == 1
        and any(source.op == "get_attr" for source in node.all_input_nodes)
    )


def branch_call(kind: str, block: Block, residual: Residual, model: nn.Module) -> str | None:
    """The key of the module call right under the block that does the branch's work: ``blocks.0.attn``."""
    does = is_attention if kind == "attention" else is_linear
    for node in residual.branch[::-1]:
        if does(node, model):
            keys = list(stack_of(node))
            below = keys[keys.index(block.scope.key) + 1 :] if block.scope.key in keys else []
            if below:
                return below[0]
    return None


def attention_span(
    residual: Residual, scope: Scope | None, crossings: Crossings, model: nn.Module
) -> tuple[fx.Node, fx.Node]:
    """From where to where attention works: the trimmed branch, or, among other layers (a bottleneck's), its module."""
    inside = set(scope.nodes) if scope else set()
    if inside and any(traits_of(node).mixes for node in residual.branch if node not in inside):
        crossing = crossings.find(scope.nodes) if scope else None
        if crossing is not None:
            return crossing
    return trim_branch(residual, model)


def branch_sites(anatomy: Anatomy) -> Iterable[Located]:
    """Attention and MLP branches of blocks: from the norm that opens the branch to before its drop-path."""
    convolved = {node for unit in anatomy.units for node in unit.nodes}
    for block in anatomy.blocks:
        for residual in block.residuals:
            kind = branch_kind(residual, anatomy.model, convolved)
            if kind is not None:
                located = _branch_site(anatomy, kind, block, residual)
                if located is not None:
                    yield located


def _branch_site(
    anatomy: Anatomy, kind: Literal["attention", "mlp"], block: Block, residual: Residual
) -> Located | None:
    trimmed = start, end = trim_branch(residual, anatomy.model)
    key = branch_call(kind, block, residual, anatomy.model)
    if kind == "attention":
        start, end = attention_span(residual, anatomy.scopes.get(key or ""), anatomy.crossings, anatomy.model)
    # where attention is only a part of its branch, other layers come before the end of that
    joint = joint_of(residual, anatomy.model) if (start, end) == trimmed else None
    if joint is not None and shape_of(joint) != shape_of(end):
        joint = None
    path = plain_path(key) if key else f"{block.scope.path}.{kind}"
    layout = anatomy.layout(start, residual.branch)
    site = anatomy.site(kind, path, block.scope.call, start, end, layout)
    if site is None:
        return None
    window = window_of(residual, site.grid, anatomy.usual_window) if kind == "attention" else None
    activation = anatomy.activation(block.scope.nodes)
    padding = (window[0] // 2, window[1] // 2) if window else (0, 0)
    site = replace(site, kernel=window, padding=padding, activation=activation, stage=anatomy.stage_of[block.scope.key])
    return Located(site=site, input=start, output=end, joint=joint)
