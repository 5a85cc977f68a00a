"""Packing: each adapter of a file in the form that its scheme stores it in, which needs no base.

The plan says how an adapter is built, the file holds its tensors, and the scheme's own rule makes an equal one of fewer
numbers; schemes without such a rule are left as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace

import torch
from torch import nn

from cadapt.bundle import Bundle
from cadapt.errors import RefusedError
from cadapt.making import read_insertion
from cadapt.plan import Insertion
from cadapt.surgery import adapter_path


def pack_bundle(bundle: Bundle) -> tuple[Bundle, int]:
    """Return the bundle with its adapters packed, and how many changed for it.

    What changed is in fp64, so that it is rounded once, by whoever writes it; all else is the bundle's own.

    Raises:
        RefusedError: the plan is none of ours, or the tensors are not those it calls for.
    """
    tensors = dict(bundle.tensors)
    insertions = tuple(_pack(insertion, tensors) for insertion in bundle.plan.insertions)
    changed = sum(new is not old for new, old in zip(insertions, bundle.plan.insertions, strict=True))
    return replace(bundle, plan=replace(bundle.plan, insertions=insertions), tensors=tensors), changed


def _pack(insertion: Insertion, tensors: dict[str, torch.Tensor]) -> Insertion:
    """Pack one adapter, its tensors in place; return its entry in the plan, the same one where nothing changed."""
    method, config = read_insertion(insertion)
    if method.pack is None:
        return insertion
    with torch.device("meta"):
        adapter = method.build(insertion.site, insertion.form, config)
    prefix = f"{adapter_path(insertion)}."
    _load(adapter, prefix, tensors)
    packed, new_config = method.pack(adapter, config)
    if new_config == config:
        return insertion
    for name in adapter.state_dict():
        del tensors[prefix + name]
    tensors.update((prefix + name, tensor) for name, tensor in packed.state_dict().items())
    return replace(insertion, config=asdict(new_config))


def _load(adapter: nn.Module, prefix: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give an adapter without data its tensors of a file, floating ones in fp64."""
    state = {}
    for name, expected in adapter.state_dict().items():
        found = tensors.get(prefix + name)
        if found is None:
            raise RefusedError(f"damaged adapter: the file lacks '{prefix}{name}'")
        if found.shape != expected.shape:
            shapes = f"{tuple(found.shape)}, expected {tuple(expected.shape)}"
            raise RefusedError(f"damaged adapter: '{prefix}{name}' has shape {shapes}")
        state[name] = found.double() if found.is_floating_point() else found
    adapter.load_state_dict(state, assign=True)
