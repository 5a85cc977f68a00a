"""The order of folding: always the adapter whose going moves the logits least, measured on the model as it is by then.

Measuring every adapter again after every fold would take S² passes; the harm of a fold rarely falls once others are
folded, so only the least of the old figures is measured again, until one stays the least (Minoux's lazy greedy, 1978).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cadapt.merging.fitted.judge import Answers, answer, compare
from cadapt.merging.fitted.options import Batches
from cadapt.merging.fitted.stand_in import Measured, measure
from cadapt.merging.fitted.workbench import Fold, Workbench

# an adapter this small beside what it is added to may do nothing; a stand-in this poor may do worse than nothing
_SMALL, _POOR = 1e-3, 0.1
_REMEASURED = 2


@dataclass
class _Candidate:
    """An adapter that is still there: what its going would be, and the harm it would do, as last measured."""

    fold: Fold
    harm: float


class Greedy:
    """Folds the adapters of a workbench one after another.

    Args:
        work: the workbench that is changed.
        reference: another of the same model, which stays unmerged.
        batches: the pictures that stand-ins are fitted on.
        pictures: how many they are.
        screen: some of them, which harm is measured on.
    """

    def __init__(
        self, work: Workbench, reference: Workbench, *, batches: Batches, pictures: int, screen: Batches
    ) -> None:
        self.work, self.reference = work, reference
        self.batches, self.pictures, self.screen = batches, pictures, screen
        self.wanted: Answers = answer(reference.model, screen)
        self.measured: Sequence[Measured] = self._measure(range(len(work.joints)))

    def _measure(self, indices: Sequence[int]) -> list[Measured]:
        pairs = [(self.work.joints[index], self.reference.joints[index]) for index in indices]
        return measure(self.work.model, self.reference.model, pairs, self.batches, self.pictures)

    def folds(self, on_progress: Callable[[str], None]) -> Iterator[Fold]:
        """Apply all folds in turn, least harmful first; each is yielded when it has been applied."""
        left = []
        for index, found in enumerate(self.measured):
            left.append(self._consider(index, found))
            on_progress(f"measured {index + 1} of {len(self.measured)} adapters")
        while left:
            best = self._least(left)
            left.remove(best)
            self.work.apply(best.fold)
            yield best.fold

    def _least(self, left: list[_Candidate]) -> _Candidate:
        fresh: set[int] = set()
        for _ in range(min(_REMEASURED, len(left))):
            left.sort(key=lambda item: item.harm)
            if left[0].fold.index in fresh:
                break
            index = left[0].fold.index
            left[0] = self._consider(index, self._measure([index])[0])
            fresh.add(index)
        return min((item for item in left if item.fold.index in fresh), key=lambda item: item.harm)

    def _consider(self, index: int, found: Measured) -> _Candidate:
        """The less harmful of what can be done with one adapter."""
        options = []
        if found.changes:
            options.append(Fold(index=index, action="fitted", changes=found.changes))
        if not found.changes or found.relative_size < _SMALL or (found.r2 or 0.0) < _POOR:
            options.append(Fold(index=index, action="dropped", changes={}))
        candidates = [_Candidate(fold=fold, harm=self._harm(fold)) for fold in options]
        # of two that do no harm, the one that changes nothing
        return min(candidates, key=lambda item: (item.harm, item.fold.action))

    def _harm(self, fold: Fold) -> float:
        with self.work.applied(fold):
            return compare(answer(self.work.model, self.screen), self.wanted).logit_error
