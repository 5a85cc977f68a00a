"""The forms in which a trained model can be shipped, side by side, for comparing what they cost to run.

The base stands among them with the task's head in place of its own, so that nothing but the adapters differs.
"""

from __future__ import annotations

import copy

import torch

from cadapt.adapted import AdaptedModel
from cadapt.merging.differences import absorb_deltas
from cadapt.merging.rebuild import bare_base, rebuild, survey_again
from cadapt.merging.sites import Decision, decide
from cadapt.surgery import adapter_path


def forms_of(model: AdaptedModel, merged: AdaptedModel) -> dict[str, AdaptedModel]:
    """Return ``base`` (with the task's head), ``adapted``, ``simplified`` and ``merged``, all in fp32 on the CPU.

    Args:
        model: the adapted model, unmerged; left as it is.
        merged: what :func:`cadapt.merging.merge` made of it; left as it is.

    Returns:
        The models in eval mode by name. ``simplified`` (all adapters there, each in the cheapest form that computes the
        same, as with α folded into the last layer) is left out where it is the merged model, or the adapted one.
    """
    adapted = copy.deepcopy(model).cpu().double().eval()
    plain = bare_base(adapted)
    surveyed = survey_again(adapted, plain)
    forms = {"base": rebuild(adapted, plain, surveyed, staying=(), layers={}), "adapted": adapted}
    simpler = _simplify_all(adapted)
    insertions = tuple(item.insertion for item in simpler)
    if insertions != merged.plan.insertions and insertions != adapted.plan.insertions:
        staying = [(item.insertion, item.adapter) for item in simpler if item.adapter is not None]
        base = absorb_deltas(plain, adapted)
        forms["simplified"] = rebuild(adapted, base, surveyed, staying=staying, layers={})
    forms["merged"] = copy.deepcopy(merged).cpu().eval()
    return {name: form.to(torch.float32) for name, form in forms.items()}


def _simplify_all(adapted: AdaptedModel) -> tuple[Decision, ...]:
    """Every adapter in its checked simpler form, none folded into its layer."""
    modules = dict(adapted.named_modules(remove_duplicate=False))
    return tuple(
        decide(
            insertion,
            adapted.get_submodule(adapter_path(insertion)),
            modules.get(insertion.site.path),
            "only simplified, for comparison",
        )
        for insertion in adapted.plan.insertions
    )
