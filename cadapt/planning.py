"""Deciding what a scheme does to a base: its sites surveyed, its placements filtered and checked, its head chosen.

A plan is a value; nothing is built here. :mod:`cadapt.surgery` carries it out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import fx

from cadapt.adapters import SCHEMES, BaseTensor, Placement, Scheme, configure, get_schemes
from cadapt.backbone import Backbone
from cadapt.classifiers import backbone_tensors, classifier_paths
from cadapt.errors import CadaptError, UsageError
from cadapt.graph.anatomy import Located
from cadapt.graph.scopes import called_around
from cadapt.graph.shift import Readers
from cadapt.graph.sites import locate_sites
from cadapt.graph.trace import record_shapes, trace
from cadapt.plan import Head, Insertion, Plan
from cadapt.site import Site


@dataclass(frozen=True, kw_only=True)
class Survey:
    """A traced base with its sites: what a plan is made from.

    ``located`` holds nodes of ``graph``; ``tensors`` are those that the graph reads, the classifier's left out.
    """

    graph: fx.Graph
    located: tuple[Located, ...]
    tensors: Mapping[str, BaseTensor] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[Site, ...]:
        """All places where adapters can join, in the order in which they run."""
        return tuple(item.site for item in self.located)


def survey(backbone: Backbone) -> Survey:
    """Trace a base at its input size and find its sites."""
    graph = trace(backbone.model)
    record_shapes(graph, backbone.model, backbone.preprocessing.input_size)
    # the task's head stands in for the classifier, and for all of a module that was not traced through around it
    heads = {called_around(graph, path) or path for path in classifier_paths(backbone.model)}
    located = locate_sites(graph, backbone.model)
    tensors = {
        name: BaseTensor(owner=type(backbone.model.get_submodule(_owner(name))).__name__, shape=shape)
        for name, (shape, _) in Readers(graph, backbone.model).names.items()
        if not name.startswith(tuple(f"{path}." for path in heads))
    }
    return Survey(
        graph=graph,
        located=tuple(item for item in located if not (item.site.kind == "layer" and item.site.path in heads)),
        tensors=tensors,
    )


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
        scheme: a scheme's name, or several joined by ``+``.
        settings: its settings; ``lora.rank`` is one of several schemes'.
        include: globs over the paths of sites, and of layers whose tensors change; none given means all.
        exclude: globs over site paths to leave out.
        seed: initialises the adapters.
        surveyed: the base's sites, where they are known already.

    Raises:
        UsageError: an unknown scheme or setting, globs that leave nothing, a setting that does not fit a site.
        CadaptError: the base has nothing to adapt under this scheme; says why and which schemes fit.
    """
    methods = get_schemes(scheme)
    configs = configure(methods, dict(settings or {}))
    # a linear probe asks nothing of the base
    asks = any(method.needs for method in methods)
    found = surveyed or (survey(backbone) if asks else Survey(graph=fx.Graph(), located=()))
    chosen = [method.select(found.sites, config) for method, config in zip(methods, configs, strict=True)]
    changed = [method.changes(found.tensors) for method in methods]
    for method, placements, names in zip(methods, chosen, changed, strict=True):
        if method.needs and not placements and not names:
            raise _nothing_to_adapt(backbone, method, found)
    offered = [
        [*(_named(item.site) for item in placements), *map(_owner, names)]
        for placements, names in zip(chosen, changed, strict=True)
    ]
    wanted = _filter([path for paths in offered for path in paths], include, exclude)
    for method, paths in zip(methods, offered, strict=True):
        if paths and not wanted & set(paths):
            raise UsageError(f"--include and --exclude leave {method.name} no site to adapt")
    insertions = [
        insertion
        for method, config, placements in zip(methods, configs, chosen, strict=True)
        for insertion in _insertions(method, config, [item for item in placements if _named(item.site) in wanted])
    ]
    return Plan(
        base=backbone.base,
        scheme=scheme,
        settings=_given(settings, include, exclude),
        insertions=tuple(insertions),
        trainable=tuple(name for method in methods for name in method.tunes(_own_parameters(backbone))),
        deltas=tuple(dict.fromkeys(name for names in changed for name in names if _owner(name) in wanted)),
        bn_policy="train" if any(method.bn_policy == "train" for method in methods) else "frozen",
        seed=seed,
    )


def _insertions(method: Scheme, config: Any, placements: Sequence[Placement]) -> Iterator[Insertion]:
    misfits: dict[str, str] = {}
    for item in placements:
        reason = method.fits(item.site, item.form, config)
        if reason is not None:
            misfits.setdefault(_named(item.site), reason)
    if misfits:
        raise _misfit(method, misfits, config)
    for item in placements:
        yield Insertion(site=item.site, scheme=method.name, form=item.form, config=asdict(config))


def _own_parameters(backbone: Backbone) -> Iterator[str]:
    """The names of the base's parameters without its classifier's, told only to a scheme that asks."""
    backbone_names = backbone_tensors(backbone.model).keys()
    yield from (name for name, _ in backbone.model.named_parameters() if name in backbone_names)


def fitting_schemes(surveyed: Survey) -> dict[str, str | None]:
    """For every scheme, None where it can adapt a surveyed base under its defaults, else the reason why not."""
    return {name: _why_not(method, surveyed) for name, method in SCHEMES.items()}


def _why_not(method: Scheme, surveyed: Survey) -> str | None:
    config = method.configure({})
    placements = method.select(surveyed.sites, config)
    if method.needs and not placements and not method.changes(surveyed.tensors):
        return f"it has no {method.needs}"
    for item in placements:
        reason = method.fits(item.site, item.form, config)
        if reason is not None:
            return f"'{item.site.name}': {reason}"
    return None


def _nothing_to_adapt(backbone: Backbone, method: Scheme, surveyed: Survey) -> CadaptError:
    fitting = [name for name, reason in fitting_schemes(surveyed).items() if reason is None]
    return CadaptError(
        f"{backbone.base.name} has nothing to adapt under {method.name}: it has no {method.needs}",
        hint=f"schemes that fit it: {', '.join(fitting)}",
    )


_SHOWN = 3


def _misfit(method: Scheme, misfits: Mapping[str, str], config: Any) -> UsageError:
    path, reason = next(iter(misfits.items()))
    if path == "input":
        return UsageError(f"cannot put {method.name} at the input: {reason}")
    shown = " ".join(f"--exclude {name!r}" for name in list(misfits)[:_SHOWN])
    hint = f"leave the site out: {shown}"
    if len(misfits) > 1:
        rest = f" and {len(misfits) - _SHOWN} more" if len(misfits) > _SHOWN else ""
        hint = f"leave {len(misfits)} such sites out: {shown}{rest} (globs work)"
    if getattr(config, "gamma", None) is not None and getattr(config, "down", "channel") == "channel":
        hint = "leave out --gamma for 4, taken to the nearest width that divides, or " + hint
    return UsageError(f"cannot put {method.name} at '{path}': {reason}", hint=hint)


def _filter(paths: Sequence[str], include: Sequence[str], exclude: Sequence[str]) -> set[str]:
    """The paths that the globs leave."""

    def is_wanted(path: str) -> bool:
        taken = not include or any(fnmatchcase(path, glob) for glob in include)
        return taken and not any(fnmatchcase(path, glob) for glob in exclude)

    if not paths and (include or exclude):
        raise UsageError("--include and --exclude choose sites, and this scheme adapts none")
    for glob in (*include, *exclude):
        if not any(fnmatchcase(path, glob) for path in paths):
            known = ", ".join(paths[:4])
            raise UsageError(f"no site matches '{glob}'", hint=f"the sites are {known} …: cadapt inspect --sites")
    wanted = {path for path in paths if is_wanted(path)}
    if paths and not wanted:
        raise UsageError("--include and --exclude leave no site to adapt")
    return wanted


def _named(site: Site) -> str:
    """What globs choose a site by: its path, or ``input``."""
    return site.path or site.kind


def _owner(tensor: str) -> str:
    """The path of the layer that a tensor belongs to."""
    return tensor.rpartition(".")[0]


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
