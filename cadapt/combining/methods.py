"""The methods by name, as ``--method`` takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from cadapt.combining.dare import merge_dare
from cadapt.combining.linear import add, average
from cadapt.combining.settings import Settings
from cadapt.combining.ties import merge_ties
from cadapt.combining.vectors import Vector
from cadapt.errors import UsageError, close_matches

__all__ = ["METHODS", "Method", "Settings", "get_method"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to combine: ``run`` maps task vectors to the combined one, ``uses`` are the settings it looks at."""

    name: str
    paper: str
    run: Callable[[Sequence[Vector], Settings], dict[str, torch.Tensor]]
    uses: tuple[str, ...]

    def describe(self, settings: Settings) -> str:
        """The settings it looks at, as text."""
        values = {
            "weights": "weights " + ", ".join(f"{weight:g}" for weight in settings.weights),
            "density": f"density {settings.density:g}",
            "scale": f"scale {settings.scale:g}",
            "seed": f"seed {settings.seed}",
        }
        return "; ".join(values[name] for name in self.uses)


METHODS: Mapping[str, Method] = {
    item.name: item
    for item in (
        Method(name="average", paper="arXiv 2203.05482, section 2", run=average, uses=("weights",)),
        Method(name="linear", paper="arXiv 2212.04089, section 4", run=add, uses=("weights",)),
        Method(
            name="ties",
            paper="arXiv 2306.01708, section 4.2",
            run=merge_ties,
            uses=("weights", "density", "scale"),
        ),
        Method(name="dare", paper="arXiv 2311.03099, section 3.2", run=merge_dare, uses=("weights", "density", "seed")),
    )
}


def get_method(name: str) -> Method:
    """Return a method by its name.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in METHODS:
        raise UsageError(f"unknown method '{name}'", hint=close_matches(name, METHODS))
    return METHODS[name]
