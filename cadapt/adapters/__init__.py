"""The methods, one file each: nn.Modules and where they go. Knows no graph.

``SCHEMES`` is discovered from the files of this package: a new method is a new file that defines ``SCHEMES``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType

from cadapt.adapters.scheme import MergedLayer, Placement, Refusal, Scheme
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


__all__ = ["SCHEMES", "MergedLayer", "Placement", "Refusal", "Scheme", "get_scheme"]
