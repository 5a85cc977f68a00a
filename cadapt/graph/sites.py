"""The site finder: from a traced model to the places where adapters can join.

It reads the graph only: additions, convolutions, attention, and which module call each ran in. A :class:`Located`
pairs a site with its nodes in this very trace, for the splice that follows; the site alone outlives it.
"""

from __future__ import annotations

from torch import fx, nn

from cadapt.graph.anatomy import Anatomy, Located
from cadapt.graph.block_sites import block_sites, stage_sites
from cadapt.graph.branches import branch_sites
from cadapt.graph.conv_sites import conv_sites, linear_sites
from cadapt.graph.layer_sites import input_sites, layer_sites
from cadapt.site import Site


def locate_sites(graph: fx.Graph, model: nn.Module) -> tuple[Located, ...]:
    """Return the sites of a traced model with their nodes, in the order in which they run.

    Args:
        graph: a trace of ``model`` with its shapes recorded.
        model: the model, for the settings of its modules; it is not run.
    """
    anatomy = Anatomy(graph, model)
    kinds = (block_sites, conv_sites, stage_sites, branch_sites, linear_sites, input_sites, layer_sites)
    found = [located for sites_of_kind in kinds for located in sites_of_kind(anatomy)]
    return tuple(sorted(found, key=lambda item: (anatomy.order[item.output], item.site.kind)))


def find_sites(graph: fx.Graph, model: nn.Module) -> tuple[Site, ...]:
    """Return the sites of a traced model whose shapes are recorded, in the order in which they run."""
    return tuple(located.site for located in locate_sites(graph, model))
