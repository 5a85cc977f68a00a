"""Deciding what a scheme does to a base: its sites surveyed, its placements filtered and checked, its head chosen.

A plan is a value; nothing is built here. :mod:`cadapt.surgery` carries it out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import fx

from cadapt.adapters import SCHEMES, Placement, Scheme, get_scheme
from cadapt.backbone import Backbone
from cadapt.classifiers import backbone_tensors, classifier_paths
from cadapt.errors import CadaptError, UsageError
from cadapt.graph.anatomy import Located
from cadapt.graph.sites import locate_sites
from cadapt.graph.trace import record_shapes, trace
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
    return Plan(
        base=backbone.base,
        scheme=scheme,
        settings=_given(settings, include, exclude),
        insertions=tuple(
            Insertion(site=item.site, scheme=scheme, form=item.form, config=asdict(config)) for item in chosen
        ),
        trainable=method.tunes(_own_parameters(backbone)),
        bn_policy=method.bn_policy,
        seed=seed,
    )


def _own_parameters(backbone: Backbone) -> Iterator[str]:
    """The names of the base's parameters without its classifier's, told only to a scheme that asks."""
    backbone_names = backbone_tensors(backbone.model).keys()
    yield from (name for name, _ in backbone.model.named_parameters() if name in backbone_names)


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
        CadaptError: the base says of no classifier that a head could stand in for.
    """
    paths = classifier_paths(backbone.model)
    if not paths:
        raise CadaptError(
            f"{backbone.base.name} has no classifier to put a head in place of",
            hint="a model of your own says which it is by a method get_classifier() that returns the module",
        )
    path, others = paths[0], paths[1:]
    if num_classes is not None:
        seeded = {"seed": plan.seed, **settings}
        return replace(plan, head=Head(path=path, others=others, num_classes=num_classes, init="new", **seeded))
    weight = getattr(backbone.model.get_submodule(path), "weight", None)
    if weight is None:
        return plan
    return replace(plan, head=Head(path=path, others=others, num_classes=int(weight.shape[0]), init="base", **settings))
