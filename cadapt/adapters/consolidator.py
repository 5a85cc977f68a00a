"""Consolidator: grouped linear maps beside every linear layer and 1×1 conv, which fold into it after training.

Hao et al., "Consolidator: Mergeable Adapter with Grouped Connections for Visual Adaptation", ICLR 2023, arXiv
2305.00603: y = W₀x + b₀ + Σ_b DropPath_p(G_b P_b x + β_b). Of its two consolidations ``pack_branches`` is the one
between training and storage, ``merge_branches`` the one between loading and inference.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from cadapt.adapters.consolidator_layers import (
    DEFAULT_GROUPS,
    Branch,
    Consolidator,
    StoredConsolidator,
    find_groups,
    shared_groups,
)
from cadapt.adapters.conv_merge import add_to_layer, find_plain_conv, fold_beside
from cadapt.adapters.conv_reach import explain_reach, own_geometry
from cadapt.adapters.scheme import Fold, Placement, Refusal, Scheme, joining
from cadapt.errors import UsageError
from cadapt.plan import Form
from cadapt.site import Site, SiteKind

_CONVS: tuple[SiteKind, ...] = ("conv", "downsample")


@dataclass(frozen=True, kw_only=True)
class ConsolidatorConfig:
    """Settings of Consolidator.

    Args:
        groups: g of each branch: ``384``, or ``384,192`` for two. A number that does not divide a layer's inputs and
            outputs alike is refused; none given is one branch of 384 groups where that divides them, else of the
            largest number below 384 that does. Beside a grouped conv with a larger kernel it is a multiple of that
            conv's groups, which so stay.
        shuffle: whether every branch reads its input with the channels shuffled for its own g, (Px)[i·g + a] =
            x[a·c + i] for c = C/g. Nothing moves where g or c is 1, and branches of one g read alike.
        drop_path: p of the drop-path on each branch by itself.
        init: ``zero`` (the inserted model computes what the base does) or ``paper``: U(±1e-3) for weights and biases.
        kernels: ``one``: beside linear layers and 1×1 convs, as in the paper; ``all``: beside convs with larger
            kernels too, whose centre tap takes the branches up.
        stored: one sparse matrix and one bias in place of the branches; export makes it. It can train on, as one matrix
            with one drop-path, but not as the branches it came from.

    Raises:
        UsageError: a value out of its range.
    """

    groups: tuple[int, ...] = ()
    shuffle: bool = False
    drop_path: float = 0.0
    init: Literal["zero", "paper"] = "zero"
    kernels: Literal["one", "all"] = "one"
    stored: bool = False

    def __post_init__(self) -> None:
        if any(number < 1 for number in self.groups):
            shown = ",".join(map(str, self.groups))
            raise UsageError(f"groups is {shown}, expected 1 or more for each branch", hint="try --set groups=384")
        if not 0 <= self.drop_path < 1:
            raise UsageError(f"drop_path is {self.drop_path:g}, expected 0 up to 1", hint="try --set drop_path=0.2")


def _select(sites: Iterable[Site], config: ConsolidatorConfig) -> tuple[Placement, ...]:
    """Every linear layer and 1×1 conv of every block, in parallel; where asked, every other conv as well."""
    kinds = ("linear",) if config.kernels == "one" else ("linear", *_CONVS)
    return tuple(Placement(site=site, form="parallel") for site in sites if site.kind in kinds)


def _fits(site: Site, form: Form, config: ConsolidatorConfig) -> str | None:
    inputs, outputs = site.in_channels, site.out_channels
    for groups in config.groups:
        if inputs % groups or outputs % groups:
            known = ", ".join(str(number) for number in shared_groups(inputs, outputs)[:4])
            return (
                f"its {inputs} inputs and {outputs} outputs do not both divide into {groups} groups, but into {known}"
            )
    if site.kind in _CONVS:
        return explain_reach(site) if site.layout == "NCHW" else "the channels of its map are last"
    if site.layout == "NCHW":
        sides = tuple((side - 1) // step + 1 for side, step in zip(site.in_shape[1:], site.stride, strict=True))
        if site.out_shape[1:] != sides:
            return f"its 1×1 conv pads: it gives {site.out_shape[1:]}, without padding {sides}"
    return None


def _choose_groups(site: Site, config: ConsolidatorConfig) -> tuple[int, ...]:
    inputs, outputs = site.in_channels, site.out_channels
    nested = [number for number in shared_groups(inputs, outputs) if number % site.groups == 0]
    if config.groups or site.kind not in _CONVS or not nested:
        return find_groups(inputs, outputs, config.groups)
    return (next((number for number in nested if number <= DEFAULT_GROUPS), nested[-1]),)


def _build(site: Site, form: Form, config: ConsolidatorConfig) -> nn.Module:
    inputs, outputs = site.in_channels, site.out_channels
    groups = _choose_groups(site, config)
    geometry = own_geometry(site) if site.kind in _CONVS else None
    settings: dict[str, Any] = {
        "shuffle": config.shuffle,
        "drop_path": config.drop_path,
        # the channels of a linear layer are last
        "stride": site.stride if site.layout == "NCHW" else None,
    }
    adapter: nn.Module
    if config.stored:
        adapter = StoredConsolidator(inputs, outputs, groups, **settings, geometry=geometry)
    else:
        branches = [Branch(inputs, outputs, number, **settings) for number in groups]
        adapter = Consolidator(branches, geometry=geometry)
    if config.init == "paper":
        for parameter in adapter.parameters():
            nn.init.uniform_(parameter, -1e-3, 1e-3)
    return adapter


def merge_branches(site: Site, form: Form, adapter: nn.Module, layer: nn.Module | None) -> Fold:
    """The second consolidation: W = W₀ + Σ G_b P_b and b = b₀ + Σ β_b, exact for linear layers and plain convs.

    Args:
        site: where the adapter stands.
        form: how it joins.
        adapter: the adapter, as it trains or as a file holds it.
        layer: the base's module at the site's path.

    Returns:
        The layer's new weight and bias in fp64, or the refusal.
    """
    assert isinstance(adapter, Consolidator | StoredConsolidator)
    matrix, bias = adapter.summed()
    # a subclass, or a parametrised layer, may compute its weight
    if type(layer) is nn.Linear:
        return add_to_layer(layer, matrix, bias)
    conv = find_plain_conv(site, layer)
    return conv if isinstance(conv, Refusal) else fold_beside(conv, matrix[:, :, None, None], bias)


def _covering(adapter: nn.Module) -> Branch | None:
    """Of several branches the one whose matrix has room for the non-zeros of all, where there is one."""
    if not isinstance(adapter, Consolidator) or len(adapter.branches) == 1:
        return None
    branches: Any = adapter.branches
    patterns = [branch.pattern() for branch in branches]
    for branch, pattern in zip(branches, patterns, strict=True):
        if not any(bool((other & ~pattern).any()) for other in patterns):
            found: Branch = branch
            return found
    return None


@torch.no_grad()
def sum_into_one(adapter: nn.Module, config: ConsolidatorConfig) -> tuple[nn.Module, ConsolidatorConfig]:
    """Sum several branches into the one of them that has room for all, which computes less; else return them as given.

    Without the shuffle it is the branch of the fewest groups, where its g divides the others'. Computed in fp64 and
    rounded once; the argument is left as it was.
    """
    wide = _covering(adapter)
    if wide is None:
        return adapter, config
    assert isinstance(adapter, Consolidator)
    matrix, bias = adapter.summed()
    branch = Branch(
        wide.in_channels,
        wide.out_channels,
        wide.groups,
        shuffle=wide.shuffle,
        drop_path=config.drop_path,
        stride=wide.stride,
    ).to(wide.weight)
    branch.weight.copy_(matrix.gather(1, wide.columns()))
    branch.bias.copy_(bias)
    summed = Consolidator([branch], geometry=adapter.geometry).train(adapter.training)
    return summed, replace(config, groups=(wide.groups,))


@torch.no_grad()
def pack_branches(adapter: nn.Module, config: ConsolidatorConfig) -> tuple[nn.Module, ConsolidatorConfig]:
    """The first consolidation, between training and storage: several branches as one sparse matrix and one bias.

    Holds the union of the branches' non-zeros, as a branch where that is one's own pattern and as a
    :class:`StoredConsolidator` otherwise. One branch is returned as given. Computed in fp64 and rounded once; the
    argument is left as it was.
    """
    if not isinstance(adapter, Consolidator) or len(adapter.branches) == 1:
        return adapter, config
    summed, simpler = sum_into_one(adapter, config)
    if simpler != config:
        return summed, simpler
    branches: Any = adapter.branches
    stored = StoredConsolidator(
        branches[0].in_channels,
        branches[0].out_channels,
        [branch.groups for branch in branches],
        shuffle=config.shuffle,
        drop_path=config.drop_path,
        stride=branches[0].stride,
        geometry=adapter.geometry,
    ).to(branches[0].weight)
    stored.fill(*adapter.summed())
    return stored.train(adapter.training), replace(config, stored=True)


SCHEMES = (
    Scheme(
        name="consolidator",
        paper="arXiv 2305.00603",
        summary="grouped linear maps parallel to each linear layer and 1×1 conv of the blocks; they fold in",
        config=ConsolidatorConfig,
        needs="linear layers or 1×1 convs in its blocks",
        joins=joining("parallel", "linear", *_CONVS),
        select=_select,
        fits=_fits,
        build=_build,
        merge=merge_branches,
        simplify=sum_into_one,
        pack=pack_branches,
    ),
)
