"""What was found about adapters that are to be combined, as frozen values with JSON. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class PairConflict:
    """How far two task vectors disagree, each times its weight; figures are None where a vector is zero then.

    ``cosine`` is of the angle between the two. ``sign_conflict`` is the share of disagreeing signs among the entries
    that are of the larger ones in both vectors, as TIES counts (arXiv 2306.01708, section 3); vectors that know nothing
    of each other have 0.5. ``cancelled`` weighs it by magnitude, over all entries: the share of Σ|a| + Σ|b| that is
    gone from Σ|a + b|; 0.29 for normal vectors of one length that know nothing of each other. ``norm_ratio`` is the
    second's norm over the first's.
    """

    first: str
    second: str
    cosine: float | None
    sign_conflict: float | None
    cancelled: float | None
    norm_ratio: float | None


@dataclass(frozen=True, kw_only=True)
class PlaceConflict:
    """The vectors at one place: a layer of the base, or an adapter that does not fold.

    ``schemes`` are those of the files, in their order, None where a file changed nothing there; ``norms`` are of the
    vectors times their weights.
    """

    place: str
    kind: Literal["folded", "adapter"]
    schemes: tuple[str | None, ...]
    norms: tuple[float, ...]
    pairs: tuple[PairConflict, ...]

    @property
    def cosine(self) -> float | None:
        """The mean over the pairs."""
        return mean([pair.cosine for pair in self.pairs])

    @property
    def sign_conflict(self) -> float | None:
        """The mean over the pairs."""
        return mean([pair.sign_conflict for pair in self.pairs])

    @property
    def cancelled(self) -> float | None:
        """The mean over the pairs."""
        return mean([pair.cancelled for pair in self.pairs])


@dataclass(frozen=True, kw_only=True)
class TaskFacts:
    """One file: ``folded`` adapters fold into the base, ``kept`` do not; ``norm`` is that of its task vector.

    ``images`` and ``top1`` are of its own model on its own pictures, None where none were given.
    """

    name: str
    scheme: str
    classes: int
    seed: int
    folded: int
    kept: int
    norm: float
    data: str | None = None
    images: int | None = None
    top1: float | None = None


@dataclass(frozen=True, kw_only=True)
class CombinationFigures:
    """What one method's combination does on each task's pictures, in the order of the files.

    ``known`` is top-1 among the task's own classes by its own head, ``open`` among the classes of all tasks, which is
    what the written file gives; None where the heads cannot be joined.
    """

    method: str
    settings: str
    known: tuple[float, ...]
    open: tuple[float | None, ...]

    @property
    def mean_known(self) -> float:
        """The mean over the tasks."""
        return sum(self.known) / len(self.known)

    @property
    def mean_open(self) -> float | None:
        """The mean over the tasks."""
        return mean(list(self.open))

    @property
    def worst_known(self) -> float:
        """Of the task that fares worst."""
        return min(self.known)

    @property
    def worst_open(self) -> float | None:
        """Of the task that fares worst."""
        return min((value for value in self.open if value is not None), default=None)


@dataclass(frozen=True, kw_only=True)
class CombineReport:
    """Whether adapters can be combined.

    ``overall`` compares the whole vectors. ``classes`` are those of the combined file; ``head`` says how its classifier
    comes about, ``head_reason`` why there can be none. ``seeds_differ`` says that adapters which do not fold were
    trained from different first values, so that their combination means less. ``best`` is the method that would be
    written, or was, ``chosen_by`` what made it that; ``verdict`` is one sentence.
    """

    base: str
    tasks: tuple[TaskFacts, ...]
    places: tuple[PlaceConflict, ...]
    overall: tuple[PairConflict, ...]
    density: float
    seeds_differ: bool
    head: Literal["stacked", "averaged", "none"]
    head_reason: str = ""
    classes: tuple[str, ...]
    combinations: tuple[CombinationFigures, ...] = ()
    best: str
    chosen_by: str
    verdict: str
    applied: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object, versioned by ``schema``; fields are only ever added."""
        record = asdict(self)
        for row, place in zip(record["places"], self.places, strict=True):
            row |= {"cosine": place.cosine, "sign_conflict": place.sign_conflict, "cancelled": place.cancelled}
        for row, item in zip(record["combinations"], self.combinations, strict=True):
            row |= {"mean_known": item.mean_known, "mean_open": item.mean_open}
            row |= {"worst_known": item.worst_known, "worst_open": item.worst_open}
        return {"schema": SCHEMA, "kind": "combination", **record}


def mean(values: list[float | None]) -> float | None:
    """The mean of the values that are known, or None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
