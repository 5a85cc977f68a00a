"""What each node of a graph does to its input, told once: whether it mixes, bends or attends.

The searches for shortcuts and units ask this of the same nodes many times; the answers are kept in ``node.meta``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from cadapt.graph.convs import Conv, conv_of
from cadapt.graph.flow import mark_flow
from cadapt.graph.operators import activation_of, is_attention, is_closed, is_linear, is_norm, is_product, module_of


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What a node does.

    ``mixes``: it is a conv or linear layer, or a module that holds such and could not be opened; ``bends``: it is no
    linear map of its input (an activation, a gate, a product, a module not opened, attention); ``normalises`` tells
    norms other than batch norm, which is a linear map while frozen.
    """

    conv: Conv | None = None
    mixes: bool = False
    bends: bool = False
    attends: bool = False
    normalises: bool = False


def mark_traits(graph: fx.Graph, model: nn.Module) -> None:
    """Note the flow and the traits of each node of a graph with recorded shapes."""
    mark_flow(graph)
    for node in graph.nodes:
        node.meta["traits"] = _read(node, model) if node.meta["from_input"] else Traits()


def traits_of(node: fx.Node) -> Traits:
    """What was noted of a node."""
    traits: Traits = node.meta["traits"]
    return traits


def _read(node: fx.Node, model: nn.Module) -> Traits:
    module = module_of(node, model)
    conv = conv_of(node, model)
    closed = module is not None and is_closed(module)
    attends = is_attention(node, model)
    return Traits(
        conv=conv,
        mixes=conv is not None or closed or is_linear(node, model),
        bends=closed or attends or activation_of(node, model) is not None or is_product(node),
        attends=attends,
        normalises=is_norm(node, model) and not isinstance(module, nn.modules.batchnorm._BatchNorm),
    )
