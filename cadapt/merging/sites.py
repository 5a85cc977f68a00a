"""One adapter's fate: fold it into the base's layer by its scheme's rule, else simplify it, else keep it.

The rule is the scheme's; whether it holds is found out here, by computing both sides. A merge that fails its check
is refused with the figures and never delivered. Modules are read and never changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import fx, nn

from cadapt.adapters import Refusal, get_scheme
from cadapt.merging.folding import Fold, ask_fold, is_whole
from cadapt.merging.measure import (
    adapter_input,
    compare_adapters,
    compare_layers,
    count_macs,
    count_parameters,
    effect_of,
)
from cadapt.merging.report import SiteMerge
from cadapt.plan import Insertion

BOUND_FP64 = 1e-12
# rounding a conv's thousands of sums differently shows at 1e-6; more would be a weight that fp32 cannot hold
BOUND_FP32 = 1e-4


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What is to be done with one adapter: a new ``layer`` in place of the site's, or an ``adapter`` that stays.

    ``insertion`` is the adapter's entry in the plan while it stays.
    """

    row: SiteMerge
    insertion: Insertion
    layer: nn.Module | None = None
    adapter: nn.Module | None = None


def decide(
    insertion: Insertion,
    adapter: nn.Module,
    layer: nn.Module | None,
    obstacle: str | None = None,
    *,
    as_deltas: bool = False,
    dense: bool = False,
) -> Decision:
    """Decide what becomes of one trained adapter, and measure it.

    Args:
        insertion: its entry in the plan.
        adapter: the module, in fp64 on the CPU, in eval mode.
        layer: the base's module at its site, likewise; None where the site is no module.
        obstacle: why the layer must not be changed, whatever the scheme's rule says.
        as_deltas: change only tensors that the layer has, so that an adapter file can hold what changed.
        dense: fold even where that costs more multiply–accumulates than layer and adapter by themselves.
    """
    if layer is not None and not is_whole(insertion.site, layer):
        layer = None
    if obstacle:
        return _simplify(insertion, adapter, layer, obstacle)
    outcome = ask_fold(insertion, adapter, layer, as_deltas=as_deltas, dense=dense)
    if isinstance(outcome, Refusal):
        return _simplify(insertion, adapter, layer, outcome.reason)
    assert layer is not None
    return _fold(insertion, adapter, layer, outcome)


def _fold(insertion: Insertion, adapter: nn.Module, layer: nn.Module, outcome: Fold) -> Decision:
    exact = compare_layers(insertion, adapter, layer, outcome.layer, torch.float64)
    rounded = compare_layers(insertion, adapter, layer, outcome.layer, torch.float32)
    row = replace(
        _row(insertion, adapter),
        error_fp64=exact.error,
        error_fp32=rounded.error,
        effect=exact.effect,
        relative_update=outcome.relative_update,
    )
    if not (exact.error <= BOUND_FP64 and rounded.error <= BOUND_FP32):
        return _refuse(insertion, adapter, row)
    shape = insertion.site.in_shape
    row = replace(
        row,
        status="exact",
        note=outcome.note,
        parameters_after=count_parameters(outcome.layer) - count_parameters(layer),
        macs_after=count_macs(outcome.layer, shape) - count_macs(layer, shape),
    )
    if exact.effect == 0:
        row = replace(row, note="; ".join(filter(None, ("the adapter does nothing: its output is zero", row.note))))
    return Decision(row=row, insertion=insertion, layer=outcome.layer)


def _refuse(insertion: Insertion, adapter: nn.Module, row: SiteMerge) -> Decision:
    effect = "the layer's output is zero" if row.effect is None else f"the adapter's effect is {row.effect:.1e}"
    reason = (
        f"the merged layer fails its check: relative error {row.error_fp64:.1e} in fp64 (at most {BOUND_FP64:.0e}) and "
        f"{row.error_fp32:.1e} in fp32 (at most {BOUND_FP32:.0e}), where {effect}"
    )
    return Decision(row=replace(row, status="refused", reason=reason), insertion=insertion, adapter=adapter)


def _simplify(insertion: Insertion, adapter: nn.Module, layer: nn.Module | None, reason: str) -> Decision:
    row = replace(_row(insertion, adapter), reason=reason, effect=effect_of(insertion, adapter, layer))
    kept = Decision(row=row, insertion=insertion, adapter=adapter)
    method = get_scheme(insertion.scheme)
    if method.simplify is None:
        return kept
    config = method.configure(insertion.config)
    simpler, new_config = method.simplify(adapter, config)
    if new_config == config:
        return kept
    exact = compare_adapters(insertion, adapter, simpler, torch.float64)
    rounded = compare_adapters(insertion, adapter, simpler, torch.float32)
    row = replace(row, error_fp64=exact.error, error_fp32=rounded.error)
    if not (exact.error <= BOUND_FP64 and rounded.error <= BOUND_FP32):
        failed = (
            f"{reason}; and its simpler form fails its check: relative error {exact.error:.1e} in fp64, "
            f"{rounded.error:.1e} in fp32"
        )
        return Decision(row=replace(row, status="refused", reason=failed), insertion=insertion, adapter=adapter)
    shape = adapter_input(insertion.site, insertion.form)
    row = replace(
        row,
        status="simplified",
        parameters_after=count_parameters(simpler),
        macs_after=count_macs(simpler, shape),
    )
    return Decision(row=row, insertion=replace(insertion, config=asdict(new_config)), adapter=simpler)


def _row(insertion: Insertion, adapter: nn.Module) -> SiteMerge:
    """The row of an adapter that stays as it is."""
    parameters = count_parameters(adapter)
    macs = count_macs(adapter, adapter_input(insertion.site, insertion.form))
    return SiteMerge(
        site=insertion.site.name,
        kind=insertion.site.kind,
        scheme=insertion.scheme,
        form=insertion.form,
        status="kept",
        parameters_before=parameters,
        parameters_after=parameters,
        macs_before=macs,
        macs_after=macs,
    )


def find_obstacle(site_path: str, modules: Mapping[str, nn.Module], graph: fx.Graph) -> str | None:
    """Why a base's layer must not be changed for one site: it, or its weight, serves elsewhere as well.

    Args:
        site_path: the layer's path.
        modules: the base's modules by every path they have.
        graph: the base's graph.
    """
    layer = modules.get(site_path)
    if layer is None:
        return None
    calls = [node for node in graph.nodes if node.op == "call_module" and modules.get(str(node.target)) is layer]
    if len(calls) > 1:
        return f"the layer is called {len(calls)} times, and this adapter stands at one of the calls"
    names = {f"{path}.{leaf}" for path, module in modules.items() if module is layer for leaf in ("weight", "bias")}
    reads = [node for node in graph.nodes if node.op == "get_attr" and node.target in names]
    # a layer that was traced through is known by who reads its tensors
    readers = {user for node in reads for user in node.users}
    if not calls and len(readers) > 1:
        return f"the layer is used {len(readers)} times, and this adapter stands at one of them"
    if calls and reads:
        return f"the base reads the layer's {str(reads[0].target).rpartition('.')[2]} elsewhere as well"
    if reads and isinstance(layer, nn.Linear):
        return f"the base reads the layer's {str(reads[0].target).rpartition('.')[2]} without calling it"
    own = {id(parameter) for parameter in layer.parameters(recurse=False)}
    for path, module in modules.items():
        tied = any(id(parameter) in own for parameter in module.parameters(recurse=False))
        if tied and module is not layer:
            return f"the layer shares its weight with '{path}'"
    return None
