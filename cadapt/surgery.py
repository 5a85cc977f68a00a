"""Where graph and adapters meet: carrying out a plan on a base.

``operate`` turns a base and a :class:`Plan` into an :class:`AdaptedModel`, the same for the same plan and seed, and
leaves the base as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import fx, nn

from cadapt.adapted import ADAPTERS, AdaptedModel
from cadapt.adapters.conv_reach import pads_by_mode
from cadapt.backbone import Backbone
from cadapt.errors import CadaptError, RefusedError
from cadapt.graph.anatomy import Located
from cadapt.graph.operators import shape_of
from cadapt.graph.scopes import called_around
from cadapt.graph.shift import Readers
from cadapt.graph.splice import Splicer
from cadapt.head import build_head
from cadapt.making import adapter_name, build_like, make_adapter, seed_of
from cadapt.plan import Head, Insertion, Plan
from cadapt.planning import Survey, survey
from cadapt.site import Site


def operate(backbone: Backbone, plan: Plan, surveyed: Survey | None = None) -> AdaptedModel:
    """Splice a plan's adapters and head into a copy of the base.

    Args:
        backbone: the base; it is left as it was.
        plan: what to do. Adapters are initialised from its seed.
        surveyed: the base's sites, where they are known already; its graph is not changed.

    Raises:
        RefusedError: the base lacks a site of the plan, or it is another there.
    """
    own = dict(backbone.model.named_parameters(remove_duplicate=False))
    for name in plan.trainable:
        if name not in own:
            raise RefusedError(f"damaged plan: {plan.base.name} has no parameter '{name}' to train")
    found = surveyed or survey(backbone)
    values: dict[fx.Node, fx.Node] = {}
    graph = _copy_graph(found.graph, values)
    located = {_place(item.site): item for item in found.located}
    base = copy.deepcopy(backbone.model)
    adapters = nn.Module()
    splicer = Splicer(graph, base)
    insertions = []
    for insertion in plan.insertions:
        item, matched = _match(insertion, located, plan)
        adapter = make_adapter(matched, plan.seed, base)
        if matched is not insertion and pads_by_mode(adapter):
            raise _differing(insertion, item, plan)
        target = _attach(adapters, matched, adapter)
        splicer.join(_copied(item, values), target, matched.form)
        insertions.append(matched)
    plan = replace(plan, insertions=tuple(insertions))
    if plan.head is not None:
        _splice_head(graph, base, adapters, plan.head)
    _splice_deltas(graph, base, adapters, plan)
    model = AdaptedModel(
        base,
        base_graph=_copy_graph(found.graph, {}),
        graph=graph,
        adapters=adapters,
        plan=plan,
        preprocessing=backbone.preprocessing,
    )
    return model


def _copied(item: Located, values: Mapping[fx.Node, fx.Node]) -> Located:
    joint = None if item.joint is None else values[item.joint]
    return replace(item, input=values[item.input], output=values[item.output], joint=joint)


def _splice_deltas(graph: fx.Graph, base: nn.Module, adapters: nn.Module, plan: Plan) -> None:
    """Hang a zero difference for each base tensor of the plan under ``adapters.delta`` and let the graph add it."""
    if not plan.deltas:
        return
    group = nn.Module()
    adapters.add_module("delta", group)
    readers = Readers(graph, base)
    targets = {}
    for name in plan.deltas:
        key = name.replace(".", "__")
        if name not in readers.names or hasattr(group, key):
            raise RefusedError(f"{plan.base.name} has no tensor '{name}' to change")
        shape, like = readers.names[name]
        group.register_parameter(key, nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device)))
        targets[name] = f"{ADAPTERS}.delta.{key}"
    readers.shift(targets)


# what a site is called by, not what an adapter there computes
_DESCRIPTIVE = frozenset({"stage", "operator"})


def _place(site: Site) -> tuple[str, str, int]:
    return site.kind, site.path, site.call


def _copy_graph(graph: fx.Graph, values: dict[fx.Node, fx.Node]) -> fx.Graph:
    """Copy a graph, filling ``values`` with what became of each node."""
    copied = fx.Graph()
    result = copied.graph_copy(graph, values)
    copied.output(result)
    return copied


def _match(
    insertion: Insertion, located: Mapping[tuple[str, str, int], Located], plan: Plan
) -> tuple[Located, Insertion]:
    """The base's site that an insertion names, and the insertion with what files from before do not say of it."""
    item = located.get(_place(insertion.site))
    if item is None:
        raise RefusedError(f"{plan.base.name} has no {insertion.site.kind} site '{insertion.site.name}' to adapt")
    differing = _differences(insertion, item)
    if not differing:
        return item, insertion
    if differing.keys() == {"padding_mode"} and _is_older(insertion, item):
        # what it was trained as, if it pads nothing by the mode; that is known once it is built
        return item, replace(insertion, site=replace(insertion.site, padding_mode=item.site.padding_mode))
    raise _differing(insertion, item, plan)


def _differences(insertion: Insertion, item: Located) -> dict[str, str]:
    return {
        key: f"{key} {getattr(item.site, key)}, expected {value}"
        for key, value in vars(insertion.site).items()
        if key not in _DESCRIPTIVE and getattr(item.site, key) != value
    }


def _is_older(insertion: Insertion, item: Located) -> bool:
    """Whether an insertion may be of a file from before sites had a padding mode."""
    return item.site.padding_mode != insertion.site.padding_mode == "zeros"


def _differing(insertion: Insertion, item: Located, plan: Plan) -> RefusedError:
    older = "its adapter may be of a cadapt that padded by zeros here: insert and train again"
    told = "; ".join(_differences(insertion, item).values())
    return RefusedError(
        f"site '{insertion.site.name}' of {plan.base.name} differs: {told}",
        hint=older if _is_older(insertion, item) else None,
    )


def _attach(adapters: nn.Module, insertion: Insertion, adapter: nn.Module) -> str:
    """Hang an adapter under its scheme's and site's names and return its path from the root."""
    path = adapter_path(insertion)
    _, scheme, name = path.split(".")
    if not hasattr(adapters, scheme):
        adapters.add_module(scheme, nn.Module())
    group = adapters.get_submodule(scheme)
    if hasattr(group, name):
        raise RefusedError(f"damaged plan: two adapters of {insertion.scheme} at '{insertion.site.name}'")
    group.add_module(name, adapter)
    return path


def adapter_path(insertion: Insertion) -> str:
    """Where an insertion's adapter hangs in the adapted model: ``adapters.conv_par.layer1__0__conv2``."""
    return f"{ADAPTERS}.{insertion.scheme.replace('-', '_')}.{adapter_name(insertion.site)}"


def _splice_head(graph: fx.Graph, base: nn.Module, adapters: nn.Module, head: Head) -> None:
    """Put the task's classifiers where the base's are called: at ``adapters.head``, or below it for each of several."""
    several = bool(head.others)
    if several:
        adapters.add_module("head", nn.Module())
    for index, path in enumerate(head.paths):
        called = called_around(graph, path)
        calls = [node for node in graph.nodes if node.op == "call_module" and node.target == called]
        shape = shape_of(calls[0].all_input_nodes[0]) if calls else None
        if shape is None:
            raise CadaptError(f"the classifier '{path}' is not called by itself: a head cannot stand in for it")
        target = f"head.{index}" if several else "head"
        build = partial(build_head, base.get_submodule(called), head, shape=shape[1:])
        adapters.set_submodule(target, build_like(build, seed_of(head.seed, target), base))
        for node in calls:
            node.target = f"{ADAPTERS}.{target}"
