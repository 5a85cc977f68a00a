"""What a fitted merge says of each adapter: the rows of the exact merge, with what was measured and became of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from cadapt.merging.fitted.hosts import Joint
from cadapt.merging.fitted.options import Fit
from cadapt.merging.fitted.stand_in import Measured
from cadapt.merging.fitted.workbench import Fold
from cadapt.merging.report import STAYING, SiteMerge


def settle_rows(
    rows: Sequence[SiteMerge],
    joints: Sequence[Joint],
    measured: Sequence[Measured],
    folds: Sequence[Fold],
    folded: int,
    *,
    before: Callable[[str], Any],
    after: nn.Module,
    notes: Mapping[str, str],
    fit: Fit,
    refined: bool,
) -> tuple[SiteMerge, ...]:
    """The rows of all adapters.

    Args:
        rows: as the exact merge left them; those that stayed are the joints', in order.
        joints: of the adapters that stayed.
        measured: each of them before any was folded.
        folds: all of them, in the frontier's order.
        folded: how many of the folds were done.
        before: gives a host, by its path, as a plain layer before anything was folded.
        after: what came of it.
        notes: where a layer's new bias went, by the layer's path.
        fit: what was asked for.
        refined: whether the adapters that stay were trained on.
    """
    step = {fold.index: number for number, fold in enumerate(folds, start=1)}
    action = {fold.index: fold.action for fold in folds[:folded]}
    settled = []
    counted: set[str] = set()
    index = 0
    for row in rows:
        if row.status not in STAYING:
            settled.append(row)
            continue
        found, joint = measured[index], joints[index]
        row = replace(
            row,
            linear_share=found.linear_share,
            relative_size=found.relative_size,
            r2=found.r2,
            hosts=tuple(host.path for host in joint.hosts),
            step=step[index],
        )
        if index in action:
            settled.append(_gone(row, action[index], before, after, notes, counted))
        else:
            settled.append(_staying(row, fit, refined))
        index += 1
    return tuple(settled)


def _gone(
    row: SiteMerge,
    action: str,
    before: Callable[[str], Any],
    after: nn.Module,
    notes: Mapping[str, str],
    counted: set[str],
) -> SiteMerge:
    """The row of an adapter that went; ``counted`` are layers whose new bias is in another row, and those of this."""
    nothing = replace(row, parameters_after=0, macs_after=0, error_fp64=None, error_fp32=None)
    if action == "dropped":
        return replace(nothing, status="dropped", hosts=(), reason="the model is within the tolerance without it")
    layers = {path: (before(path), after.get_submodule(path)) for path in row.hosts}
    grown = sum(_bias_count(new) - _bias_count(old) for path, (old, new) in layers.items() if path not in counted)
    counted.update(layers)
    return replace(
        nothing,
        status="fitted",
        reason=f"a kernel stands in for {row.r2 or 0.0:.1%} of it",
        note="; ".join(notes[path] for path in row.hosts if path in notes),
        parameters_after=grown,
        relative_update=_update(list(layers.values())),
    )


def _staying(row: SiteMerge, fit: Fit, refined: bool) -> SiteMerge:
    row = replace(row, reason=f"{row.reason}; {_why_not(row, fit)}")
    if not refined:
        return row
    # what was found of it before is not true of it any more
    return replace(row, error_fp64=None, error_fp32=None, note="trained on, to the unmerged model's logits")


def _why_not(row: SiteMerge, fit: Fit) -> str:
    if not row.hosts:
        return "no layer of the base reaches its joint linearly, and without it the model leaves the tolerance"
    return f"a kernel would stand in for {row.r2 or 0.0:.1%} of it, and folding it leaves the tolerance {fit.tolerance}"


def _bias_count(layer: nn.Module) -> int:
    bias = getattr(layer, "bias", None)
    return 0 if bias is None else int(bias.numel())


@torch.no_grad()
def _update(layers: Sequence[tuple[Any, Any]]) -> float | None:
    """‖ΔW‖/‖W‖ over the hosts together, for all that they took up: other adapters' kernels may be among it."""
    change = sum(float((new.weight - old.weight).square().sum()) for old, new in layers)
    size = sum(float(old.weight.square().sum()) for old, _ in layers)
    return math.sqrt(change / size) if size else None
