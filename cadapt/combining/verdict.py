"""One sentence about a comparison: by what was measured on pictures where there are some, else by the vectors."""

from __future__ import annotations

from collections.abc import Sequence

from cadapt.combining.report import CombinationFigures, PairConflict, TaskFacts, mean

# points of top-1, and cosines, between which the words change
_WELL, _WITH_LOSS = 0.01, 0.05
_ALIKE, _AGAINST = 0.1, -0.1


def best_of(combinations: Sequence[CombinationFigures]) -> CombinationFigures | None:
    """The combination of the best mean top-1 with the task known; of equal ones that which is better over all classes.

    None where nothing was measured.
    """
    return max(combinations, key=lambda item: (item.mean_known, item.mean_open or 0.0), default=None)


def judge_measured(tasks: Sequence[TaskFacts], best: CombinationFigures) -> str:
    """What the best combination costs each task, in one sentence."""
    lost = {
        task.name: task.top1 - known for task, known in zip(tasks, best.known, strict=True) if task.top1 is not None
    }
    average = sum(lost.values()) / len(lost)
    worst = max(lost, key=lambda name: lost[name])
    if average <= _WELL:
        words = "they combine well"
    else:
        words = "they combine at a loss" if average <= _WITH_LOSS else "better keep them apart"
    verb = "loses" if average >= 0 else "gains"
    sentence = (
        f"{words}: {best.method} {verb} {_points(abs(average))} of top-1 on average with the task known "
        f"(at worst {_points(lost[worst])}, on {worst})"
    )
    over_all = best.mean_open
    return sentence if over_all is None else f"{sentence}, and is right on {100 * over_all:.1f} % over all classes"


def _points(share: float) -> str:
    return f"{100 * share:.1f} points"


def judge_vectors(overall: Sequence[PairConflict]) -> str:
    """What the vectors alone let expect, in one sentence."""
    cosine, conflict = mean([pair.cosine for pair in overall]), mean([pair.sign_conflict for pair in overall])
    if cosine is None:
        return "nothing to tell: a task vector is zero, so a file learned nothing beside its head"
    if cosine > _ALIKE:
        words = "the vectors point the same way: an average is likely to serve all"
    elif cosine >= _AGAINST:
        words = "the vectors are nearly at right angles: they disturb each other as noise would"
    else:
        words = "the vectors work against each other: a sum undoes part of each"
    signs = "" if conflict is None else f", {100 * conflict:.0f} % of the larger entries disagree in sign"
    return f"{words} (cosine {cosine:.2f}{signs}); top-1 is told with --data"
