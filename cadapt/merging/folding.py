"""Asking a scheme's rule to fold an adapter into a layer, and making the layer that comes of it, still unchecked.

A rule knows plain layers. What stands around it is known here: a weight-standardised conv is asked about as the plain
one of the same arithmetic, and a fold that needs fewer groups is made only where it costs no more, or is wanted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from cadapt.adapters import MergedLayer, Refusal, Regrouped, get_scheme
from cadapt.adapters.conv_merge import regroup
from cadapt.merging.converting import plain_form, restandardise, with_weights
from cadapt.merging.measure import adapter_input, count_macs, relative_error, share_of
from cadapt.plan import Insertion
from cadapt.site import Site

# a kernel further from the wanted one than this is not the same to fp64
_SAME = 1e-13


@dataclass(frozen=True, kw_only=True)
class Fold:
    """The layer that is to stand for the base's and an adapter, unchecked.

    ``relative_update`` is ‖ΔW‖/‖W‖ of what the two convolve with, None where W is zero and ΔW is not; ``note`` says
    what else is new about the layer.
    """

    layer: nn.Module
    relative_update: float | None
    note: str = ""


def is_whole(site: Site, layer: nn.Module) -> bool:
    """Whether the module at a site's path is all that its adapter stands beside, and not one conv of several."""
    return site.kind not in ("conv", "downsample") or site.operator in ("", type(layer).__name__)


def ask_rule(insertion: Insertion, adapter: nn.Module, layer: nn.Module | None) -> MergedLayer | Refusal:
    """Fold one adapter by its scheme's rule into a layer of the very same kind and shape, unchecked.

    Arguments as :func:`ask_fold` takes them; in any one dtype.
    """
    outcome = _ask(insertion, adapter, layer)
    if isinstance(outcome, Regrouped):
        return Refusal(reason=_explain_groups(layer, outcome))
    return outcome


def _ask(insertion: Insertion, adapter: nn.Module, layer: nn.Module | None) -> MergedLayer | Regrouped | Refusal:
    if layer is not None and not is_whole(insertion.site, layer):
        layer = None
    outcome = get_scheme(insertion.scheme).merge(insertion.site, insertion.form, adapter, layer)
    if not isinstance(outcome, MergedLayer):
        return outcome
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return Refusal(reason=f"a {type(layer).__name__} has no weight that could take it up")
    if outcome.weight.shape != weight.shape:
        found, own = tuple(outcome.weight.shape), tuple(weight.shape)
        return Refusal(reason=f"the merged weight has shape {found}, the layer's has {own}: another architecture")
    return outcome


def ask_fold(
    insertion: Insertion, adapter: nn.Module, layer: nn.Module | None, *, as_deltas: bool = False, dense: bool = False
) -> Fold | Refusal:
    """Fold one adapter into the layer of its site, or into a plain one of the same arithmetic, unchecked.

    Args:
        insertion: its entry in the plan.
        adapter: the module, in eval mode.
        layer: the base's module at its site, likewise and of the same dtype; None where the site is no module.
        as_deltas: change only tensors that the layer has, or a bias that it may have: no other kind, no other groups.
        dense: fold even where that costs more multiply–accumulates than layer and adapter by themselves.
    """
    if layer is None or not is_whole(insertion.site, layer):
        refused = _ask(insertion, adapter, None)
        assert isinstance(refused, Refusal), insertion.site.name
        return refused
    plain = plain_form(insertion.site, layer)
    if isinstance(plain, str):
        return Refusal(reason=plain)
    # the rule is asked about the layer as it is now
    site = replace(insertion.site, operator=type(plain).__name__) if insertion.site.operator else insertion.site
    outcome = _ask(replace(insertion, site=site), adapter, plain)
    if isinstance(outcome, Regrouped):
        reason = _explain_groups(layer, outcome) if as_deltas else None
        reason = reason if dense or reason else _explain_cost(insertion, adapter, plain, outcome)
        outcome = Refusal(reason=reason) if reason else outcome.build()
    if isinstance(outcome, Refusal):
        return outcome
    return _make(insertion.site, layer, plain, outcome, as_deltas=as_deltas)


def _make(site: Site, layer: nn.Module, plain: nn.Module, outcome: MergedLayer, *, as_deltas: bool) -> Fold | Refusal:
    kind, own = type(layer).__name__, _weight_of(plain)
    groups = getattr(plain, "groups", 1)
    wanted = outcome.groups or groups
    update = share_of(outcome.weight - regroup(own.double(), groups, wanted), own)
    if as_deltas and isinstance(layer, nn.Linear) and layer.bias is None and outcome.bias is not None:
        return Refusal(reason="the linear layer has no bias, and an adapter file gives new ones to convs only")
    if plain is layer:
        note = f"the conv has {_count(wanted)} now, and had {groups}" if wanted != groups else ""
        return Fold(layer=with_weights(layer, outcome), relative_update=update, note=note)
    solved = restandardise(layer, outcome)
    if as_deltas and getattr(layer, "gain", None) is None:
        solved = None  # what its weight would have to become is not told to the precision of an adapter file
    if solved is not None and _convolves_with(site, solved, outcome):
        note = f"the {kind} keeps its kind: the merged kernel is one that it computes"
        return Fold(layer=solved, relative_update=update, note=note)
    if as_deltas:
        return Refusal(reason=f"the {kind} would have to be a plain conv to take it up, which no adapter file holds")
    note = f"the {kind} is a plain conv now: its weight is no longer computed at each call"
    note += f", and it has {_count(wanted)}" if wanted != groups else ""
    return Fold(layer=with_weights(plain, outcome), relative_update=update, note=note)


def _convolves_with(site: Site, layer: nn.Module, merged: MergedLayer) -> bool:
    """Whether a weight-standardised layer of a site computes a kernel from its weight, all but to rounding."""
    plain = plain_form(site, layer)
    return isinstance(plain, nn.Module) and relative_error(_weight_of(plain), merged.weight) <= _SAME


def _weight_of(layer: Any) -> torch.Tensor:
    weight: torch.Tensor = layer.weight.detach()
    return weight


def _explain_groups(layer: nn.Module | None, outcome: Regrouped) -> str:
    groups = getattr(layer, "groups", 1)
    return f"the conv has {groups} groups, the sum would have {_count(outcome.groups)}: another layer than the base's"


def _explain_cost(insertion: Insertion, adapter: nn.Module, layer: nn.Module, outcome: Regrouped) -> str | None:
    """Why a fold into fewer groups is not worth it: it costs more than layer and adapter do; None where it does not."""
    groups = getattr(layer, "groups", 1)
    own = count_macs(layer, insertion.site.in_shape)
    apart = own + count_macs(adapter, adapter_input(insertion.site, insertion.form))
    merged = own * groups // outcome.groups
    if merged <= apart:
        return None
    return (
        f"the conv has {groups} groups, the sum would have {_count(outcome.groups)} "
        f"and cost {merged / apart:.3g} times the multiply–accumulates of conv and adapter"
    )


def _count(groups: int) -> str:
    return "none" if groups == 1 else str(groups)
