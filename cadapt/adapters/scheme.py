"""What a method is: a value that says where its modules go, whether they fit, how they are built and merged.

Each file of this package defines one method and lists its schemes in ``SCHEMES``; the registry in
``cadapt.adapters`` finds them. A method knows sites and configs, and no graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import nn

from cadapt.errors import UsageError, close_matches
from cadapt.plan import BnPolicy, Form
from cadapt.site import Site, SiteKind


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where one adapter of a scheme goes, and how it joins."""

    site: Site
    form: Form


@dataclass(frozen=True, kw_only=True)
class MergedLayer:
    """The base layer's weight and bias with the adapter folded in, in the dtype they were computed in.

    ``groups`` is the number of groups of a conv with that weight; None is as many as the layer has.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    groups: int | None = None


@dataclass(frozen=True, kw_only=True)
class Regrouped:
    """A fold that is exact in a conv of fewer groups than the layer's, which costs more.

    It is computed only where that is wanted: the weight of a depth-wise conv that becomes dense is large.
    """

    groups: int
    build: Callable[[], MergedLayer]


@dataclass(frozen=True, kw_only=True)
class BaseTensor:
    """A tensor of the base that a scheme may change by a learned difference: the class of its layer, and its shape."""

    owner: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why something cannot be done, in one sentence."""

    reason: str


Fold = MergedLayer | Regrouped | Refusal


def joining(form: Form, *kinds: SiteKind) -> frozenset[tuple[SiteKind, Form]]:
    """What a scheme joins, for :attr:`Scheme.joins`: these kinds of sites in one form."""
    return frozenset((kind, form) for kind in kinds)


def _nothing(sites: Iterable[Site], config: Any) -> tuple[Placement, ...]:
    return ()


def _fits(site: Site, form: Form, config: Any) -> str | None:
    return None


def _build_nothing(site: Site, form: Form, config: Any) -> nn.Module:
    raise AssertionError(f"this scheme places no modules, asked at '{site.name}'")


def _no_merge(site: Site, form: Form, adapter: nn.Module, layer: nn.Module | None) -> Refusal:
    return Refusal(reason="this scheme has no rule for merging")


def _tune_nothing(names: Iterable[str]) -> tuple[str, ...]:
    return ()


def _change_nothing(tensors: Mapping[str, BaseTensor]) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class NoSettings:
    """The config of a scheme that has none."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One method as the commands name it.

    ``joins`` are the kinds of sites it joins, each with the form; ``select`` picks sites and forms; ``fits`` gives the
    reason why a config does not fit a site, or None; ``build`` makes the module, a map from the site's input (parallel,
    bypass) or output (sequential) to its output; ``merge`` folds a trained one into the site's layer or refuses;
    ``simplify`` gives an equal module, and its config, that computes less after training; ``pack`` gives an equal
    module, and its config, that a file holds in fewer bytes; ``tunes`` names the base's own tensors that train in their
    place, ``changes`` those that a learned difference is added to; ``needs`` says what a base must have, for the
    refusal where nothing was selected.
    """

    name: str
    paper: str
    summary: str
    config: type[Any] = NoSettings
    needs: str = ""
    joins: frozenset[tuple[SiteKind, Form]] = frozenset()
    select: Callable[[Iterable[Site], Any], tuple[Placement, ...]] = _nothing
    fits: Callable[[Site, Form, Any], str | None] = _fits
    build: Callable[[Site, Form, Any], nn.Module] = _build_nothing
    merge: Callable[[Site, Form, nn.Module, nn.Module | None], Fold] = _no_merge
    tunes: Callable[[Iterable[str]], tuple[str, ...]] = _tune_nothing
    changes: Callable[[Mapping[str, BaseTensor]], tuple[str, ...]] = _change_nothing
    simplify: Callable[[nn.Module, Any], tuple[nn.Module, Any]] | None = None
    pack: Callable[[nn.Module, Any], tuple[nn.Module, Any]] | None = None
    bn_policy: BnPolicy = "frozen"
    places_modules: bool = True

    def configure(self, settings: Mapping[str, Any]) -> Any:
        """Make the scheme's config from settings, which may be text from the command line.

        Raises:
            UsageError: a setting the scheme does not have, or a value of the wrong kind.
        """
        known = {item.name for item in fields(self.config)}
        for name in settings:
            if name not in known:
                tip = close_matches(name, known) if known else "it has none"
                raise UsageError(f"{self.name} has no setting '{name}'", hint=tip)
        kinds = get_type_hints(self.config)
        values = {name: _read_value(self.name, name, value, kinds[name]) for name, value in settings.items()}
        return self.config(**values)


def _read_value(scheme: str, name: str, value: Any, kind: Any) -> Any:
    """Check a value against the annotation of its field, reading text where need be."""
    choices = [item for item in get_args(kind) if isinstance(item, str)]
    if choices:
        if value in choices:
            return value
        raise UsageError(f"{scheme}: {name} is {value!r}, expected {' | '.join(choices)}")
    if get_origin(kind) is tuple:
        return _read_numbers(scheme, name, value)
    options = [item for item in (get_args(kind) or (kind,)) if item is not type(None)]
    if value is None or (isinstance(value, str) and value.lower() == "none"):
        if len(options) < len(get_args(kind)):
            return None
        raise UsageError(f"{scheme}: {name} needs a value")
    try:
        return _READERS[options[0]](value)
    except (TypeError, ValueError, KeyError) as error:
        raise UsageError(f"{scheme}: {name} is {value!r}, expected {options[0].__name__}") from error


def _read_numbers(scheme: str, name: str, value: Any) -> tuple[int, ...]:
    """Whole numbers from a tuple, from JSON's list, or from text: ``384,192``."""
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    try:
        return tuple(_read_int(item) for item in items)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{scheme}: {name} is {value!r}, expected whole numbers, as 384,192") from error


def _read_bool(value: Any) -> bool:
    return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[str(value).lower()]


def _read_int(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError(value)
    return int(value)


_READERS: dict[Any, Callable[[Any], Any]] = {bool: _read_bool, int: _read_int, float: float, str: str}
