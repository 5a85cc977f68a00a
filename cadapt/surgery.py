"""Where graph and adapters meet: planning insertions on a base, and operating on it.

``plan_insertions`` turns a scheme's name and settings into a :class:`Plan`; ``operate`` turns a base and a plan into
an :class:`AdaptedModel`, the same for the same plan and seed, and leaves the base as it was.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from cadapt.adapted import ADAPTERS, AdaptedModel
from cadapt.adapters import SCHEMES, Placement, Scheme, get_scheme
from cadapt.backbone import Backbone, backbone_tensors, classifier_path
from cadapt.errors import CadaptError, RefusedError, UsageError
from cadapt.graph.operators import shape_of
from cadapt.graph.sites import Located, locate_sites
from cadapt.graph.splice import Splicer
from cadapt.graph.trace import record_shapes, trace
from cadapt.head import build_head
from cadapt.plan import Head, Insertion, Plan
from cadapt.site import Site


@dataclass(frozen=True, kw_only=True)
class Survey:
    """A traced base with its sites: what a plan is made from. ``located`` holds nodes of ``graph``."""

    graph: fx.Graph
    located: tuple[Located, ...]

    @property
    def sites(self) -> tuple[Site, ...]:
        """All places where adapters can join, in the order in which they run."""
        return tuple(item.site for item in self.located)


def survey(backbone: Backbone) -> Survey:
    """Trace a base at its input size and find its sites."""
    graph = trace(backbone.model)
    record_shapes(graph, backbone.model, backbone.preprocessing.input_size)
    return Survey(graph=graph, located=locate_sites(graph, backbone.model))


def plan_insertions(
    backbone: Backbone,
    scheme: str,
    settings: Mapping[str, Any] | None = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
    surveyed: Survey | None = None,
) -> Plan:
    """Decide what a scheme puts where on a base.

    Args:
        backbone: the base.
        scheme: a scheme's name.
        settings: its settings.
        include: globs over site paths; only sites that match one are adapted. None given means all.
        exclude: globs over site paths to leave out.
        seed: initialises the adapters.
        surveyed: the base's sites, where they are known already.

    Raises:
        UsageError: an unknown scheme or setting, globs that leave nothing, a setting that does not fit a site.
        CadaptError: the base has nothing to adapt under this scheme; says why and which schemes fit.
    """
    method = get_scheme(scheme)
    config = method.configure(dict(settings or {}))
    sites = () if not method.places_modules else (surveyed or survey(backbone)).sites
    placements = method.select(sites, config)
    if method.places_modules and not placements:
        raise _nothing_to_adapt(backbone, method, sites)
    chosen = _filter(placements, include, exclude)
    for placement in chosen:
        reason = method.fits(placement.site, placement.form, config)
        if reason is not None:
            raise _misfit(method, placement, reason, config)
    names = {name for name, _ in backbone.model.named_parameters()} & backbone_tensors(backbone.model).keys()
    ordered = [name for name, _ in backbone.model.named_parameters() if name in names]
    return Plan(
        base=backbone.base,
        scheme=scheme,
        settings=_given(settings, include, exclude),
        insertions=tuple(
            Insertion(site=item.site, scheme=scheme, form=item.form, config=asdict(config)) for item in chosen
        ),
        trainable=method.tunes(ordered),
        bn_policy=method.bn_policy,
        seed=seed,
    )


def fitting_schemes(sites: Sequence[Site]) -> dict[str, str | None]:
    """For every scheme, None where it can adapt a base with these sites under its defaults, else the reason why not."""
    return {name: _why_not(method, sites) for name, method in SCHEMES.items()}


def _why_not(method: Scheme, sites: Sequence[Site]) -> str | None:
    if not method.places_modules:
        return None
    config = method.configure({})
    placements = method.select(sites, config)
    if not placements:
        return f"it has no {method.needs}"
    for item in placements:
        reason = method.fits(item.site, item.form, config)
        if reason is not None:
            return f"'{item.site.name}': {reason}"
    return None


def _nothing_to_adapt(backbone: Backbone, method: Scheme, sites: Sequence[Site]) -> CadaptError:
    fitting = [name for name, reason in fitting_schemes(sites).items() if reason is None]
    return CadaptError(
        f"{backbone.base.name} has nothing to adapt under {method.name}: it has no {method.needs}",
        hint=f"schemes that fit it: {', '.join(fitting)}",
    )


def _misfit(method: Scheme, placement: Placement, reason: str, config: Any) -> UsageError:
    hint = "leave the site out: --exclude " + repr(placement.site.path)
    if getattr(config, "gamma", None) is not None:
        hint = "leave out --gamma for 4, taken to the nearest width that divides, or " + hint
    return UsageError(f"cannot put {method.name} at '{placement.site.name}': {reason}", hint=hint)


def _filter(placements: Sequence[Placement], include: Sequence[str], exclude: Sequence[str]) -> tuple[Placement, ...]:
    def wanted(path: str) -> bool:
        taken = not include or any(fnmatchcase(path, glob) for glob in include)
        return taken and not any(fnmatchcase(path, glob) for glob in exclude)

    for glob in (*include, *exclude):
        if not any(fnmatchcase(item.site.path, glob) for item in placements):
            known = ", ".join(item.site.path for item in placements[:4])
            raise UsageError(f"no site matches '{glob}'", hint=f"the sites are {known} …: cadapt inspect --sites")
    chosen = tuple(item for item in placements if wanted(item.site.path))
    if placements and not chosen:
        raise UsageError("--include and --exclude leave no site to adapt")
    return chosen


def _given(settings: Mapping[str, Any] | None, include: Sequence[str], exclude: Sequence[str]) -> dict[str, Any]:
    given = {key: value for key, value in dict(settings or {}).items() if value is not None}
    if include:
        given["include"] = list(include)
    if exclude:
        given["exclude"] = list(exclude)
    return given


def with_head(plan: Plan, backbone: Backbone, num_classes: int | None, **settings: Any) -> Plan:
    """Return the plan with a task head: fresh for ``num_classes``, or a copy of the base's own where None.

    Raises:
        CadaptError: the base has no single classifier that a head could stand in for.
    """
    path = classifier_path(backbone.model)
    if path is None:
        raise CadaptError(f"{backbone.base.name} has no single classifier to put a head in place of")
    if num_classes is not None:
        return replace(
            plan, head=Head(path=path, num_classes=num_classes, init="new", **{"seed": plan.seed, **settings})
        )
    classifier = backbone.model.get_submodule(path)
    weight = getattr(classifier, "weight", None)
    if weight is None:
        return plan
    return replace(plan, head=Head(path=path, num_classes=int(weight.shape[0]), init="base", **settings))


def operate(backbone: Backbone, plan: Plan, surveyed: Survey | None = None) -> AdaptedModel:
    """Splice a plan's adapters and head into a copy of the base.

    Args:
        backbone: the base; it is left as it was.
        plan: what to do. Adapters are initialised from its seed.
        surveyed: the base's sites, where they are known already; its graph is not changed.

    Raises:
        RefusedError: the base lacks a site of the plan, or it is another there.
    """
    found = surveyed or survey(backbone)
    values: dict[fx.Node, fx.Node] = {}
    graph = _copy_graph(found.graph, values)
    located = {_place(item.site): item for item in found.located}
    base = copy.deepcopy(backbone.model)
    adapters = nn.Module()
    splicer = Splicer(graph, base)
    for insertion in plan.insertions:
        item = _match(insertion, located, plan)
        target = _attach(adapters, insertion, _make_adapter(insertion, plan, base))
        splicer.join(replace(item, input=values[item.input], output=values[item.output]), target, insertion.form)
    if plan.head is not None:
        _splice_head(graph, base, adapters, plan.head)
    model = AdaptedModel(
        base,
        base_graph=_copy_graph(found.graph, {}),
        graph=graph,
        adapters=adapters,
        plan=plan,
        preprocessing=backbone.preprocessing,
    )
    return model


def _place(site: Site) -> tuple[str, str, int]:
    return site.kind, site.path, site.call


def _copy_graph(graph: fx.Graph, values: dict[fx.Node, fx.Node]) -> fx.Graph:
    """Copy a graph, filling ``values`` with what became of each node."""
    copied = fx.Graph()
    result = copied.graph_copy(graph, values)
    copied.output(result)
    return copied


def _match(insertion: Insertion, located: Mapping[tuple[str, str, int], Located], plan: Plan) -> Located:
    item = located.get(_place(insertion.site))
    if item is None:
        raise RefusedError(f"{plan.base.name} has no {insertion.site.kind} site '{insertion.site.name}' to adapt")
    if item.site != insertion.site:
        differing = [
            f"{key} {getattr(item.site, key)}, expected {value}"
            for key, value in vars(insertion.site).items()
            if getattr(item.site, key) != value
        ]
        raise RefusedError(f"site '{insertion.site.name}' of {plan.base.name} differs: {'; '.join(differing)}")
    return item


def _make_adapter(insertion: Insertion, plan: Plan, base: nn.Module) -> nn.Module:
    method = get_scheme(insertion.scheme)
    config = method.configure(insertion.config)
    reason = method.fits(insertion.site, insertion.form, config)
    if reason is not None:
        raise RefusedError(f"cannot put {method.name} at '{insertion.site.name}': {reason}")
    seed = _seed_of(plan.seed, f"{insertion.scheme}:{insertion.site.kind}:{insertion.site.name}")
    return seeded(partial(method.build, insertion.site, insertion.form, config), seed, base)


def seeded(build: Any, seed: int, like: nn.Module) -> nn.Module:
    """Build a module under its own seed, then put it on a model's device, in its floating dtype."""
    parameter = next(like.parameters())
    if parameter.is_meta:
        with torch.device("meta"):
            module: nn.Module = build()
        return module.to(parameter.dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build()
    return module.to(device=parameter.device, dtype=parameter.dtype)


def _seed_of(seed: int, name: str) -> int:
    """A seed of its own for every adapter, so that leaving one out does not change the others."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7])


def _attach(adapters: nn.Module, insertion: Insertion, adapter: nn.Module) -> str:
    """Hang an adapter under its scheme's and site's names and return its path from the root."""
    path = adapter_path(insertion)
    _, scheme, name = path.split(".")
    if not hasattr(adapters, scheme):
        adapters.add_module(scheme, nn.Module())
    group = adapters.get_submodule(scheme)
    assert not hasattr(group, name), f"two adapters of {insertion.scheme} at {insertion.site.name}"
    group.add_module(name, adapter)
    return path


def adapter_path(insertion: Insertion) -> str:
    """Where an insertion's adapter hangs in the adapted model: ``adapters.conv_par.layer1__0__conv2``."""
    return f"{ADAPTERS}.{insertion.scheme.replace('-', '_')}.{adapter_name(insertion.site)}"


def adapter_name(site: Site) -> str:
    """A site's name as a module name, which has no dots: ``layer1__0__conv2``."""
    name = site.path.replace(".", "__")
    name = name if site.kind in ("block", "conv", "linear") else f"{name}__{site.kind}"
    return name if site.call == 0 else f"{name}__call{site.call}"


def _splice_head(graph: fx.Graph, base: nn.Module, adapters: nn.Module, head: Head) -> None:
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target == head.path]
    shape = shape_of(calls[0].all_input_nodes[0]) if calls else None
    if shape is None:
        raise CadaptError(f"the classifier '{head.path}' is not called by itself: a head cannot stand in for it")
    classifier = base.get_submodule(head.path)
    build = partial(build_head, classifier, head, features=shape[1])
    adapters.add_module("head", seeded(build, _seed_of(head.seed, "head"), base))
    for node in calls:
        node.target = f"{ADAPTERS}.head"
