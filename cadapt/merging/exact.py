"""Exact merges: every adapter that its scheme's rule folds into its layer, decided one after another and checked.

All of it happens on a private copy in fp64 on the CPU. What comes of it computes what the adapted model does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from cadapt.adapted import AdaptedModel
from cadapt.merging.bias import move_biases
from cadapt.merging.differences import absorb_deltas, bias_of, new_biases
from cadapt.merging.rebuild import bare_base, rebuild, survey_again
from cadapt.merging.report import SiteMerge
from cadapt.merging.sites import Decision, decide, find_obstacle
from cadapt.plan import Insertion
from cadapt.planning import Survey
from cadapt.surgery import adapter_path


@dataclass(frozen=True, kw_only=True)
class Folded:
    """The model with all that folds exactly folded, a row per adapter, and the layers that were given a bias."""

    model: AdaptedModel
    rows: tuple[SiteMerge, ...]
    new_biases: tuple[str, ...]


def fold_exact(adapted: AdaptedModel, *, as_deltas: bool = False, dense: bool = False) -> Folded:
    """Fold what folds exactly.

    Args:
        adapted: a private copy of the model, in fp64 on the CPU and in eval mode; it is left as it is.
        as_deltas: change only tensors of the base's own layers, so that an adapter file can hold what changed: no layer
            becomes another kind of layer, and no bias moves into a norm.
        dense: fold even where the sum costs more multiply–accumulates than layer and adapter by themselves.
    """
    plain = bare_base(adapted)
    base = absorb_deltas(plain, adapted)
    surveyed = survey_again(adapted, base)
    decisions = _decide_all(adapted, base, surveyed, as_deltas=as_deltas, dense=dense)
    staying = [(item.insertion, item.adapter) for item in decisions if item.adapter is not None]
    layers = {item.insertion.site.path: item.layer for item in decisions if item.layer is not None}
    merged = rebuild(adapted, base, surveyed, staying=staying, layers=layers)
    new = tuple(path for path in new_biases(plain, adapted.plan.deltas) if bias_of(base, path) is not None)
    rows = tuple(item.row for item in decisions) if as_deltas else _settle_biases(merged, plain, decisions, new)
    return Folded(model=merged, rows=rows, new_biases=new)


def _decide_all(
    model: AdaptedModel, base: nn.Module, surveyed: Survey, *, as_deltas: bool, dense: bool
) -> tuple[Decision, ...]:
    """Decide the adapters in the order in which they were joined, each on the layer the ones before it left."""
    modules = dict(base.named_modules(remove_duplicate=False))
    outputs = {(item.site.kind, item.site.path, item.site.call): item.output for item in surveyed.located}
    staying: set[object] = set()
    layers: dict[str, nn.Module] = {}
    decisions = []
    for insertion in model.plan.insertions:
        site = insertion.site
        output = outputs[site.kind, site.path, site.call]
        obstacle = find_obstacle(site.path, modules, surveyed.graph)
        if output in staying:
            # what that adapter reads or adds to would not be what it was trained on
            obstacle = "another adapter that joined here before it stays"
        layer = layers.get(site.path, modules.get(site.path))
        adapter = model.get_submodule(adapter_path(insertion))
        now = _as_it_is_now(insertion, modules.get(site.path), layer)
        decision = decide(now, adapter, layer, obstacle, as_deltas=as_deltas, dense=dense)
        decision = replace(decision, insertion=replace(decision.insertion, site=site))
        if decision.layer is None:
            staying.add(output)
        else:
            layers[site.path] = decision.layer
        decisions.append(decision)
    return tuple(decisions)


def _as_it_is_now(insertion: Insertion, first: nn.Module | None, layer: nn.Module | None) -> Insertion:
    """An adapter's entry with the kind of layer that the adapters before it left at its site."""
    if layer is first or first is None or insertion.site.operator != type(first).__name__:
        return insertion
    return replace(insertion, site=replace(insertion.site, operator=type(layer).__name__))


def _settle_biases(
    merged: AdaptedModel, base: nn.Module, decisions: Sequence[Decision], new: Sequence[str]
) -> tuple[SiteMerge, ...]:
    """Move biases that the base's layers had not to where they belong, and say so in the rows.

    ``new`` are the layers to which a learned difference gave one.
    """
    paths = [decision.insertion.site.path for decision in decisions if decision.layer is not None]
    grown = {path for path in (*paths, *new) if bias_of(base, path) is None and bias_of(merged, path) is not None}
    notes = move_biases(merged, merged.graph, sorted(grown))
    counted: set[str] = set()
    rows = []
    for decision in decisions:
        row, path = decision.row, decision.insertion.site.path
        if decision.layer is not None and path in notes:
            row = replace(row, note="; ".join(filter(None, (row.note, notes[path]))))
            bias = bias_of(decision.layer, "")
            if bias is not None and bias_of(merged, path) is None and path not in counted:
                # it counts for the first adapter that brought it, and is gone
                row = replace(row, parameters_after=row.parameters_after - bias.numel())
                counted.add(path)
        rows.append(row)
    return tuple(rows)
