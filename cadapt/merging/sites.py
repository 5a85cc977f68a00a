"""One adapter's fate: fold it into the base's layer by its scheme's rule, else simplify it, else keep it.

The rule is the scheme's; whether it holds is found out here, by computing both sides. A merge that fails its check
is refused with the figures and never delivered. Modules are read and never changed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from cadapt.adapters import MergedLayer, Refusal, get_scheme
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
from cadapt.site import Site

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


def decide(insertion: Insertion, adapter: nn.Module, layer: nn.Module | None, obstacle: str | None = None) -> Decision:
    """Decide what becomes of one trained adapter, and measure it.

    Args:
        insertion: its entry in the plan.
        adapter: the module, in fp64 on the CPU, in eval mode.
        layer: the base's module at its site, likewise; None where the site is no module.
        obstacle: why the layer must not be changed, whatever the scheme's rule says.
    """
    if layer is not None and not _is_whole(insertion.site, layer):
        layer = None
    outcome = Refusal(reason=obstacle) if obstacle else ask_rule(insertion, adapter, layer)
    if isinstance(outcome, MergedLayer):
        assert layer is not None
        return _fold(insertion, adapter, layer, outcome)
    return _simplify(insertion, adapter, layer, outcome.reason)


def _is_whole(site: Site, layer: nn.Module) -> bool:
    """Whether the module at a site's path is all that its adapter stands beside, and not one conv of several."""
    return site.kind not in ("conv", "downsample") or site.operator in ("", type(layer).__name__)


def ask_rule(insertion: Insertion, adapter: nn.Module, layer: nn.Module | None) -> MergedLayer | Refusal:
    """Fold one adapter by its scheme's rule, unchecked; arguments as :func:`decide` takes them, in any one dtype."""
    if layer is not None and not _is_whole(insertion.site, layer):
        layer = None
    outcome = get_scheme(insertion.scheme).merge(insertion.site, insertion.form, adapter, layer)
    if isinstance(outcome, Refusal):
        return outcome
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return Refusal(reason=f"a {type(layer).__name__} has no weight that could take it up")
    if outcome.weight.shape != weight.shape:
        found, own = tuple(outcome.weight.shape), tuple(weight.shape)
        return Refusal(reason=f"the merged weight has shape {found}, the layer's has {own}: another architecture")
    return outcome


def with_weights(layer: nn.Module, merged: MergedLayer) -> nn.Module:
    """A copy of a layer with other weights; a bias that is zero throughout is not added where the layer had none."""
    copied: Any = copy.deepcopy(layer)
    tuned: bool = copied.weight.requires_grad
    copied.weight = nn.Parameter(merged.weight.detach().clone().to(copied.weight.dtype), requires_grad=tuned)
    if merged.bias is not None and (copied.bias is not None or bool(merged.bias.any())):
        tuned = copied.bias is not None and copied.bias.requires_grad
        copied.bias = nn.Parameter(merged.bias.detach().clone().to(copied.weight.dtype), requires_grad=tuned)
    module: nn.Module = copied
    return module


def _fold(insertion: Insertion, adapter: nn.Module, layer: nn.Module, outcome: MergedLayer) -> Decision:
    folded: Any = with_weights(layer, outcome)
    exact = compare_layers(insertion, adapter, layer, folded, torch.float64)
    rounded = compare_layers(insertion, adapter, layer, folded, torch.float32)
    before: Any = layer
    update = float((folded.weight - before.weight).detach().norm() / before.weight.detach().norm())
    row = replace(
        _row(insertion, adapter),
        error_fp64=exact.error,
        error_fp32=rounded.error,
        effect=exact.effect,
        relative_update=update,
    )
    if not (exact.error <= BOUND_FP64 and rounded.error <= BOUND_FP32):
        return _refuse(insertion, adapter, row)
    grown_parameters = count_parameters(folded) - count_parameters(layer)
    row = replace(row, status="exact", parameters_after=grown_parameters, macs_after=0)
    if not exact.effect:
        row = replace(row, note="the adapter does nothing: its output is zero")
    return Decision(row=row, insertion=insertion, layer=folded)


def _refuse(insertion: Insertion, adapter: nn.Module, row: SiteMerge) -> Decision:
    reason = (
        f"the merged layer fails its check: relative error {row.error_fp64:.1e} in fp64 (at most {BOUND_FP64:.0e}) and "
        f"{row.error_fp32:.1e} in fp32 (at most {BOUND_FP32:.0e}), where the adapter's effect is {row.effect:.1e}"
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
