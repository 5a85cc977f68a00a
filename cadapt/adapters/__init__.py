"""The methods, one file each: nn.Modules and where they go. Knows no graph.

``SCHEMES`` is discovered from the files of this package: a new method is a new file that defines ``SCHEMES``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from cadapt.adapters.scheme import BaseTensor, Fold, MergedLayer, Placement, Refusal, Regrouped, Scheme
from cadapt.errors import UsageError, close_matches


def _discover() -> Mapping[str, Scheme]:
    found: dict[str, Scheme] = {}
    for item in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{item.name}")
        for scheme in getattr(module, "SCHEMES", ()):
            assert scheme.name not in found, f"two schemes are named {scheme.name}"
            found[scheme.name] = scheme
    return MappingProxyType(found)


SCHEMES: Mapping[str, Scheme] = _discover()


def get_scheme(name: str) -> Scheme:
    """Return a scheme by name.

    Raises:
        UsageError: there is none of that name, with the close ones.
    """
    if name not in SCHEMES:
        raise UsageError(f"unknown scheme '{name}'", hint=close_matches(name, SCHEMES))
    return SCHEMES[name]


def get_schemes(name: str) -> tuple[Scheme, ...]:
    """Return the schemes that a name joins by ``+``: ``consolidator+bias+norm``.

    Raises:
        UsageError: a name is unknown, comes twice, or adds nothing to another.
    """
    if not isinstance(name, str):
        raise UsageError(f"a scheme is a name, not {name!r:.60}", hint="several are joined: 'lora+bias'")
    if "," in name:
        raise UsageError(f"'{name}' is no scheme", hint=f"schemes are joined by +: {name.replace(',', '+')}")
    parts = name.split("+")
    methods = tuple(get_scheme(part) for part in parts)
    for part in parts:
        if parts.count(part) > 1:
            raise UsageError(f"'{name}' names {part} twice")
    if len(parts) > 1 and "full" in parts:
        raise UsageError(f"full trains every tensor already: nothing adds to it in '{name}'", hint="--scheme full")
    if len(parts) > 1 and "linear" in parts:
        others = "+".join(part for part in parts if part != "linear")
        raise UsageError(f"every scheme trains the head: linear adds nothing in '{name}'", hint=f"--scheme {others}")
    return methods


def configure(methods: Sequence[Scheme], settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """Make the config of each of some schemes from settings for all of them.

    A setting goes to every scheme that has it; ``lora.rank`` goes to that scheme alone.

    Raises:
        UsageError: as :meth:`Scheme.configure` says, or no scheme has a setting.
    """
    known = {method.name: {item.name for item in fields(method.config)} for method in methods}
    given: dict[str, dict[str, Any]] = {method.name: {} for method in methods}
    # a setting for one scheme counts more than the same for all
    for key, value in sorted(settings.items(), key=lambda item: "." in item[0]):
        scheme, _, name = key.rpartition(".")
        named = [item for item in known if scheme.replace("_", "-") in ("", item)]
        takers = [item for item in named if name in known[item] or len(known) == 1]
        if not takers:
            owners = [item for item in known if name in known[item]]
            choices = {name for names in known.values() for name in names}
            tip = close_matches(name, choices) if choices else "they have none"
            tip = f"{owners[0]} has it: {owners[0]}.{name}" if scheme and owners else tip
            raise UsageError(f"{scheme or '+'.join(known)} has no setting '{name if scheme else key}'", hint=tip)
        for taker in takers:
            given[taker][name] = value
    return tuple(method.configure(given[method.name]) for method in methods)


__all__ = [
    "SCHEMES",
    "BaseTensor",
    "Fold",
    "MergedLayer",
    "Placement",
    "Refusal",
    "Regrouped",
    "Scheme",
    "configure",
    "get_scheme",
    "get_schemes",
]
