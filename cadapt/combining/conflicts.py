"""How far task vectors disagree: at each place, and as a whole, for every pair of tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Literal

import torch

from cadapt.combining.report import PairConflict, PlaceConflict
from cadapt.combining.ties import shared_signs, trim
from cadapt.combining.vectors import TaskVector, Vector, norm, place_of
from cadapt.plan import Insertion


def compare_vectors(vectors: Mapping[str, Vector], density: float) -> tuple[PairConflict, ...]:
    """Compare each pair of vectors, which are those that are added: each task's, times its weight.

    ``density`` is the share of each one's entries that count as its larger ones.
    """
    trimmed = {name: trim(vector, density) for name, vector in vectors.items()}
    return tuple(
        _compare(first, second, vectors, *shared_signs(trimmed[first], trimmed[second]))
        for first, second in combinations(vectors, 2)
    )


def _compare(first: str, second: str, vectors: Mapping[str, Vector], shared: int, opposed: int) -> PairConflict:
    one, two = vectors[first], vectors[second]
    norms = norm(one), norm(two)
    apart = _mass(one) + _mass(two)
    product = sum(float((value * two[name]).sum()) for name, value in one.items() if name in two)
    together = sum(float((value + two[name]).abs().sum()) for name, value in one.items() if name in two)
    together += _mass({name: value for name, value in one.items() if name not in two})
    together += _mass({name: value for name, value in two.items() if name not in one})
    both = min(norms) > 0
    return PairConflict(
        first=first,
        second=second,
        cosine=max(-1.0, min(1.0, product / (norms[0] * norms[1]))) if both else None,
        sign_conflict=opposed / shared if shared else None,
        cancelled=max(0.0, (apart - together) / apart) if both else None,
        norm_ratio=norms[1] / norms[0] if both else None,
    )


def _mass(vector: Vector) -> float:
    return sum(float(value.abs().sum()) for value in vector.values())


def compare_places(
    vectors: Mapping[str, TaskVector], density: float, difference: Mapping[str, str]
) -> tuple[PlaceConflict, ...]:
    """Compare the vectors place by place: layers of the base first, then the adapters that do not fold.

    Args:
        vectors: the tasks' vectors by the tasks' names, times their weights.
        density: as :func:`compare_vectors` takes it, of each place.
        difference: for each task the scheme that changed the base's tensors where no adapter folded.
    """
    insertions = next(iter(vectors.values())).insertions
    kept: dict[str, str] = {}
    for insertion in insertions:
        earlier = kept.get(insertion.site.name)
        kept[insertion.site.name] = f"{earlier}+{insertion.scheme}" if earlier else insertion.scheme
    folded = _by_place({task: vector.differences for task, vector in vectors.items()}, ())
    adapters = _by_place({task: vector.adapters for task, vector in vectors.items()}, insertions)
    rows = []
    for place, parts in folded.items():
        schemes = {task: vectors[task].schemes.get(place, difference[task]) for task, part in parts.items() if part}
        rows.append(_compare_place(place, "folded", parts, schemes, density))
    for place, parts in adapters.items():
        rows.append(_compare_place(place, "adapter", parts, dict.fromkeys(parts, kept[place]), density))
    return tuple(rows)


Parts = dict[str, dict[str, dict[str, torch.Tensor]]]


def _by_place(vectors: Mapping[str, Vector], insertions: Sequence[Insertion]) -> Parts:
    """For each place, each task's tensors there; a task that changed nothing there has none."""
    parts: Parts = {}
    for task, vector in vectors.items():
        for name, value in vector.items():
            parts.setdefault(place_of(name, insertions), {other: {} for other in vectors})[task][name] = value
    return parts


def _compare_place(
    place: str,
    kind: Literal["folded", "adapter"],
    parts: Mapping[str, Vector],
    schemes: Mapping[str, str],
    density: float,
) -> PlaceConflict:
    return PlaceConflict(
        place=place,
        kind=kind,
        schemes=tuple(schemes.get(task) for task in parts),
        norms=tuple(norm(part) for part in parts.values()),
        pairs=compare_vectors(parts, density),
    )
