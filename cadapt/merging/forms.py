"""The forms in which a trained model can be shipped, side by side, for comparing what they cost to run.

The base stands among them with the task's head in place of its own, so that nothing but the adapters differs.
"""

from __future__ import annotations

from cadapt.adapted import AdaptedModel


def forms_of(model: AdaptedModel, merged: AdaptedModel) -> dict[str, AdaptedModel]:
    """Return ``base`` (with the task's head), ``adapted``, ``simplified`` and ``merged``, all in fp32 on the CPU.

    Args:
        model: the adapted model, unmerged; left as it is.
        merged: what :func:`cadapt.merging.merge` made of it.

    Returns:
        The models in eval mode by name. ``simplified`` (all adapters there, each in the cheapest form that computes the
        same, as with α folded into the last layer) is left out where it is the merged model, or the adapted one.
    """
    raise NotImplementedError
