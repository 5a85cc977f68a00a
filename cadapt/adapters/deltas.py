"""Bias tuning and norm tuning: the task adds a learned difference to small tensors that the base has everywhere.

Ben Zaken et al., "BitFit", arXiv 2106.10199 (bias), and the baselines of the Conv-Adapter paper, arXiv 2208.07463,
section 4.1. The base keeps its values: its tensor plus the difference is what a layer is called with, so that a file
carries the differences alone, and weight decay pulls towards the base and not towards zero.
"""

from __future__ import annotations

from collections.abc import Mapping

from cadapt.adapters.scheme import BaseTensor, Scheme


def _biases(tensors: Mapping[str, BaseTensor]) -> tuple[str, ...]:
    """Every bias, those of norms and of attention's queries and values (``q_bias``) too, and new ones of convs."""
    leaves = {name: name.rpartition(".")[2] for name in tensors}
    return tuple(
        name
        for name, tensor in tensors.items()
        if len(tensor.shape) == 1 and (leaves[name] == "bias" or leaves[name].endswith("_bias"))
    )


def _affines(tensors: Mapping[str, BaseTensor]) -> tuple[str, ...]:
    """The weights and biases of the norms."""
    return tuple(
        name
        for name, tensor in tensors.items()
        if "norm" in tensor.owner.lower() and name.rpartition(".")[2] in ("weight", "bias")
    )


SCHEMES = (
    Scheme(
        name="bias",
        paper="arXiv 2106.10199",
        summary="tune every bias; convs without one get a zero bias",
        needs="biases, or convs that could have one",
        changes=_biases,
        places_modules=False,
    ),
    Scheme(
        name="norm",
        paper="arXiv 2208.07463",
        summary="tune the affines of the norms",
        needs="norms with an affine",
        changes=_affines,
        places_modules=False,
    ),
)
