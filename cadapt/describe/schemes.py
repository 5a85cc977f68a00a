"""What schemes would add to one base: adapters, parameters, multiply–accumulates, memory, and whether they merge away.

No scheme is carried out but on a twin of the base without data; parameters and multiply–accumulates are those of single
adapters, counted once for all equal ones, so that all schemes of a base take seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cadapt.adapters import SCHEMES, get_schemes
from cadapt.backbone import Backbone
from cadapt.costing import count_activations
from cadapt.describe.adapters import AdapterSummary, count_adapter_macs, summarise_adapters
from cadapt.describe.merges import MergeReason, MergeRules, count_reasons
from cadapt.frozen import prepare
from cadapt.meta import meta_copy
from cadapt.plan import Plan
from cadapt.planning import Survey, fitting_schemes, plan_insertions
from cadapt.surgery import operate

# what is shown where nobody asked for others: the main method between the two ends it is compared with
USUAL_SCHEMES = ("linear", "conv-par", "conv-seq", "res-par", "res-seq", "full")
# two pictures stand for one: a batch norm that trains has no statistics of one whose maps are a single pixel
_BATCH = 2


@dataclass(frozen=True, kw_only=True)
class SchemeSummary:
    """What a scheme would add under its defaults, head left out; ``reason`` says why where it does not fit.

    ``sites`` counts adapters, ``tensors`` tensors of the base that are trained or get a learned difference.
    ``parameters`` train; ``share`` is theirs of the backbone's. ``macs_added`` is per picture, ``macs_share`` of the
    base's; ``activation_bytes`` is what training keeps for backward, in fp32, of a picture or of the batch that was
    asked for, and ``engine_activation_bytes`` what the engine leaves of it. ``merged`` counts the adapters that fold
    into the base once trained, and ``merge_reasons`` says why the others do not, and how many each reason holds for;
    changed tensors always end in the base's own.
    """

    name: str
    sites: int
    parameters: int
    share: float
    macs_added: int
    activation_bytes: int
    reason: str | None
    adapters: tuple[AdapterSummary, ...] = ()
    tensors: int = 0
    macs_share: float = 0.0
    engine_activation_bytes: int = 0
    merged: int = 0
    merge_reasons: tuple[MergeReason, ...] = ()


def all_schemes() -> tuple[str, ...]:
    """The names of all schemes, in the registry's order."""
    return tuple(SCHEMES)


def read_schemes(given: Sequence[str]) -> tuple[str, ...]:
    """The schemes that a user named, several perhaps in one text: ``lora,ssf``; each once, in their order.

    Raises:
        UsageError: one is unknown, or joins what cannot be joined.
    """
    names = tuple(dict.fromkeys(name.strip() for text in given for name in text.split(",")))
    for name in names:
        get_schemes(name)
    return names


def explain_misfits(surveyed: Survey, names: Sequence[str]) -> dict[str, str | None]:
    """For each name, also one that joins schemes by ``+``, why it does not fit a surveyed base, or None."""
    reasons = fitting_schemes(surveyed)
    found: dict[str, str | None] = {}
    for name in names:
        parts = name.split("+")
        told = [reasons[part] if len(parts) == 1 else f"{part}: {reasons[part]}" for part in parts if reasons[part]]
        found[name] = told[0] if told else None
    return found


def count_trained(backbone: Backbone, surveyed: Survey, plan: Plan) -> int:
    """The parameters that a plan trains, head left out."""
    trained = sum(item.parameters for item in summarise_adapters(plan))
    if plan.trainable:
        own = dict(backbone.model.named_parameters())
        trained += sum(own[name].numel() for name in plan.trainable)
    return trained + sum(math.prod(surveyed.tensors[name].shape) for name in plan.deltas)


def summarise_schemes(
    backbone: Backbone,
    surveyed: Survey,
    names: Sequence[str],
    base_macs: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    batch: int | None = None,
) -> tuple[SchemeSummary, ...]:
    """Say what each of some schemes would add to a base.

    Args:
        backbone: the base.
        surveyed: its sites.
        names: the schemes; one may join several by ``+``.
        base_macs: the base's multiply–accumulates for one picture.
        progress: called with how many schemes are done, and of how many.
        batch: pictures that the activations are counted for; None for a picture's share.
    """
    reasons = explain_misfits(surveyed, names)
    twin = replace(backbone, model=meta_copy(backbone.model))
    rules = MergeRules(twin.model, surveyed)
    found: list[SchemeSummary] = []
    for name in names:
        progress(len(found), len(names))
        found.append(_summarise(twin, surveyed, rules, name, reasons[name], base_macs, batch))
    return tuple(found)


def _summarise(
    twin: Backbone,
    surveyed: Survey,
    rules: MergeRules,
    name: str,
    reason: str | None,
    base_macs: int,
    batch: int | None,
) -> SchemeSummary:
    if reason is not None:
        return SchemeSummary(
            name=name, sites=0, parameters=0, share=0.0, macs_added=0, activation_bytes=0, reason=reason
        )
    plan = plan_insertions(twin, name, surveyed=surveyed)
    macs, trained = count_adapter_macs(plan, surveyed), count_trained(twin, surveyed, plan)
    outcomes = rules.ask(plan)
    plain, engine = _count_activations(twin, surveyed, plan, batch)
    return SchemeSummary(
        name=name,
        sites=len(plan.insertions),
        parameters=trained,
        share=trained / max(1, twin.base.parameters),
        macs_added=macs,
        activation_bytes=plain,
        engine_activation_bytes=engine,
        reason=None,
        adapters=summarise_adapters(plan),
        tensors=len(plan.trainable) + len(plan.deltas),
        macs_share=macs / max(1, base_macs),
        merged=outcomes.count(None),
        merge_reasons=count_reasons(outcomes),
    )


def _count_activations(twin: Backbone, surveyed: Survey, plan: Plan, batch: int | None) -> tuple[int, int]:
    """What training keeps for backward, plainly and under the engine."""
    # without a head nothing of a linear probe trains; the input of the classifier is all that its training keeps
    model = operate(twin, plan, surveyed).train()
    count, share = batch or _BATCH, 1 if batch else _BATCH
    plain, engine = (
        count_activations(item, twin.preprocessing.input_size, batch=count, disposable=True) // share
        for item in (model, prepare(model))
    )
    return plain, engine
