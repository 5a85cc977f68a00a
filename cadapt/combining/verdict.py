"""One sentence about a comparison: by what was measured on pictures where there are some, else by the vectors.

A combination is as good as what it does to the task that fares worst, and the written file has one head for the
classes of all tasks: that is what the choice among methods goes by.
"""

from __future__ import annotations

from collections.abc import Sequence

from cadapt.combining.report import CombinationFigures, PairConflict, TaskFacts, mean

# points of top-1 lost with the task known, on average and by one task, up to which the words hold
_WELL, _WITH_LOSS = (0.01, 0.05), (0.05, 0.10)
# the share of its own top-1 that each task must keep over all classes
_KEPT = 0.5
# cosines between which the words change
_ALIKE, _AGAINST = 0.1, -0.1
# differences of counts that are equal on paper are taken as equal
_DIGITS = 9


def best_of(combinations: Sequence[CombinationFigures]) -> CombinationFigures | None:
    """The combination whose worst task is right most often over all classes, as the written file is used.

    Of equal ones that of the better mean with the task known. Where heads cannot be joined, so that there is no such
    file, the worst task's top-1 with the task known decides. None where nothing was measured.
    """
    return max(combinations, key=_rank, default=None)


def _rank(item: CombinationFigures) -> tuple[float, float]:
    worst = item.worst_known if item.worst_open is None else item.worst_open
    return round(worst, _DIGITS), round(item.mean_known, _DIGITS)


def chosen_by(combinations: Sequence[CombinationFigures]) -> str:
    """What the choice among combinations goes by, in words."""
    if not combinations:
        return "default: nothing was measured"
    where = "with the task known" if combinations[0].worst_open is None else "over all classes"
    return f"the worst task's top-1 {where}, then the mean with the task known"


def judge_measured(tasks: Sequence[TaskFacts], best: CombinationFigures) -> str:
    """What the best combination costs each task, in one sentence."""
    lost = {
        task.name: round(task.top1 - known, _DIGITS)
        for task, known in zip(tasks, best.known, strict=True)
        if task.top1 is not None
    }
    average = sum(lost.values()) / len(lost)
    worst = max(lost, key=lambda name: lost[name])
    return (
        f"{_words(average, lost[worst], _is_lost_over_all(tasks, best))}: {best.method} {_change(average)} of top-1 on "
        f"average with the task known (at worst {_change(lost[worst])}, on {worst}){_over_all(tasks, best)}"
    )


def _words(average: float, worst: float, is_lost_over_all: bool) -> str:
    if average > _WITH_LOSS[0] or worst > _WITH_LOSS[1]:
        return "better keep them apart"
    if is_lost_over_all:
        return "they combine only where the task is known, which the written file is not told"
    return "they combine well" if average <= _WELL[0] and worst <= _WELL[1] else "they combine at a loss"


def _is_lost_over_all(tasks: Sequence[TaskFacts], best: CombinationFigures) -> bool:
    """Whether some task keeps too little of its own top-1 when its classes stand among all."""
    pairs = zip(tasks, best.open, strict=True)
    return any(value is not None and value < _KEPT * (task.top1 or 0.0) for task, value in pairs)


def _over_all(tasks: Sequence[TaskFacts], best: CombinationFigures) -> str:
    """What the written file gives, and for which task it gives least."""
    rows = [(value, task) for task, value in zip(tasks, best.open, strict=True) if value is not None]
    if not rows or best.mean_open is None:
        return ""
    value, task = min(rows, key=lambda row: row[0])
    return (
        f"; over all classes it is right on {_percent(best.mean_open)} on average and at worst on {_percent(value)}, "
        f"on {task.name}, whose own file is on {_percent(task.top1 or 0.0)}"
    )


def _change(lost: float) -> str:
    return f"{'loses' if lost >= 0 else 'gains'} {100 * abs(lost):.1f} points"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def judge_vectors(overall: Sequence[PairConflict]) -> str:
    """What the vectors, times their weights, let expect, and what they cannot tell, in one sentence."""
    cosine, conflict = mean([pair.cosine for pair in overall]), mean([pair.sign_conflict for pair in overall])
    unknown = (
        "how often a combination is right, with the task known or over all classes, is not known without pictures: "
        "--data for each"
    )
    if cosine is None:
        return f"nothing to compare: a file learned nothing beside its head, or has weight 0; {unknown}"
    if cosine > _ALIKE:
        words = "the vectors point the same way: little of them cancels"
    elif cosine >= _AGAINST:
        words = "the vectors are nearly at right angles: they disturb each other as noise would"
    else:
        words = "the vectors work against each other: a sum undoes part of each"
    signs = "" if conflict is None else f", {100 * conflict:.0f} % of the larger entries disagree in sign"
    return f"{words} (cosine {cosine:.2f}{signs}); {unknown}"
