"""Making the adapters that a plan calls for: what a file says is checked first, then built from its own seed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from cadapt.adapters import Scheme, get_scheme
from cadapt.errors import RefusedError, UsageError
from cadapt.plan import Insertion
from cadapt.seeding import seeded
from cadapt.site import Site


def read_insertion(insertion: Insertion) -> tuple[Scheme, Any]:
    """Return an insertion's scheme and its config, which may come from a file that was forged.

    Raises:
        RefusedError: there is no such scheme, it inserts nothing, has no such settings, or does not fit the site.
    """
    try:
        method = get_scheme(insertion.scheme)
        config = method.configure(insertion.config)
    except UsageError as error:
        raise RefusedError(f"damaged plan: {error.message}") from error
    site, form = insertion.site, insertion.form
    if (site.kind, form) not in method.joins:
        raise RefusedError(f"damaged plan: {method.name} does not join a {site.kind} site in the form '{form}'")
    reason = method.fits(site, form, config)
    if reason is not None:
        raise RefusedError(f"cannot put {method.name} at '{site.name}': {reason}")
    return method, config


def make_adapter(insertion: Insertion, seed: int, like: nn.Module) -> nn.Module:
    """Build an insertion's adapter from a plan's seed, on a model's device and in its floating dtype."""
    method, config = read_insertion(insertion)
    own_seed = seed_of(seed, f"{insertion.scheme}:{insertion.site.kind}:{insertion.site.name}")
    return build_like(partial(method.build, insertion.site, insertion.form, config), own_seed, like)


def build_like(build: Callable[[], nn.Module], seed: int, like: nn.Module) -> nn.Module:
    """Build a module under its own seed, then put it on a model's device, in its floating dtype."""
    parameter = next(like.parameters())
    if parameter.is_meta:
        with torch.device("meta"):
            module: nn.Module = build()
        return module.to(parameter.dtype)
    with seeded(seed):
        module = build()
    return module.to(device=parameter.device, dtype=parameter.dtype)


def seed_of(seed: int, name: str) -> int:
    """A seed of its own for every adapter, so that leaving one out does not change the others."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7])


def adapter_name(site: Site) -> str:
    """A site's name as a module name, which has no dots: ``layer1__0__conv2``."""
    name = site.path.replace(".", "__")
    name = name if site.kind in ("block", "conv", "linear") else f"{name}__{site.kind}".removeprefix("__")
    return name if site.call == 0 else f"{name}__call{site.call}"
