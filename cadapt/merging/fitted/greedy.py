"""The order of folding: always the adapter whose going moves the logits least, measured on the model as it is by then.

Measuring every adapter again after every fold would take S² passes; the harm of a fold rarely falls once others are
folded, so only the least of the old figures is measured again, and at most one more if another then looks less (after
Minoux's lazy greedy, 1978, which would go on until one stays the least).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
        self.measured: list[Measured] = []
        self._order = {node: place for place, node in enumerate(work.model.graph.nodes)}
        self._first_change = len(self._order)

    def folds(self, on_progress: Callable[[str], None]) -> Iterator[Fold]:
        """Apply all folds in turn, least harmful first; each is yielded when it has been applied."""
        work = self.work
        for found in measure(work.model, work.joints, self.batches, self.pictures):
            self.measured.append(found)
            on_progress(f"measured {len(self.measured)} of {len(work.joints)} adapters")
        left = [self._consider(index, found) for index, found in enumerate(self.measured)]
        while left:
            best = self._least(left)
            left.remove(best)
            work.apply(best.fold)
            self._note(best.fold)
            yield best.fold

    def _note(self, fold: Fold) -> None:
        """Remember from where on the model is another one."""
        joint = self.work.joints[fold.index]
        changed = [joint.delta, *(host.node for host in joint.hosts if host.path in fold.changes)]
        self._first_change = min(self._first_change, *(self._order[node] for node in changed))

    def _measured_again(self, index: int) -> Measured:
        """An adapter on the model as it is by now: as it was where all that changed lies behind it."""
        joint = self.work.joints[index]
        if self._order[joint.total] < self._first_change:
            return self.measured[index]
        unmerged = (self.reference.model, [self.reference.joints[index]])
        return next(measure(self.work.model, [joint], self.batches, self.pictures, unmerged))

    def _least(self, left: list[_Candidate]) -> _Candidate:
        fresh: set[int] = set()
        for _ in range(min(_REMEASURED, len(left))):
            left.sort(key=lambda item: item.harm)
            if left[0].fold.index in fresh:
                break
            index = left[0].fold.index
            left[0] = self._consider(index, self._measured_again(index))
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
