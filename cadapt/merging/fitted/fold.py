"""The fitted merge as a whole: measure every adapter, fold them one after another, choose the point to stand at."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from cadapt.adapted import AdaptedModel
from cadapt.costing import cost
from cadapt.errors import UsageError
from cadapt.merging.bias import move_biases
from cadapt.merging.differences import bias_of
from cadapt.merging.fitted.greedy import Greedy
from cadapt.merging.fitted.judge import Answers, answer, compare
from cadapt.merging.fitted.options import Batches, Fit, Fitted
from cadapt.merging.fitted.refine import refine
from cadapt.merging.fitted.settle import settle_rows
from cadapt.merging.fitted.workbench import Fold, Workbench, add_change, total_changes
from cadapt.merging.rebuild import bare_base, rebuild, survey_again
from cadapt.merging.report import STAYING, FrontierPoint, SiteMerge
from cadapt.surgery import adapter_path

_SCREENED = 64
# every fourth is held out
_LEAST_PICTURES = 4


def fold_fitted(model: AdaptedModel, rows: tuple[SiteMerge, ...], fit: Fit, *, as_deltas: bool = False) -> Fitted:
    """Fold adapters that are not linear into layers near their sites, as far as a tolerance allows.

    Args:
        model: what the exact merges left, in fp64 on the CPU; it stays as it is.
        rows: of all adapters there were; those that stay are the model's, in its plan's order.
        fit: pictures, tolerance and refinement.
        as_deltas: change only tensors of the base's own layers.

    Raises:
        UsageError: too few pictures, or none with the labels that the tolerance is about.
        CadaptError: a model gives outputs that are no finite numbers.
    """
    said = fit.on_progress or _say_nothing
    pictures = _check(fit)
    reference = Workbench(model, computed=not as_deltas)
    judge = _Judge(reference, rows, fit)
    points = [judge.point(reference.model, ())]
    if not model.plan.insertions:
        return Fitted(model=model, rows=rows, frontier=_mark(points, points[0], points[0].parameters))
    work = Workbench(model, computed=not as_deltas)
    greedy = Greedy(work, reference, batches=fit.batches, pictures=pictures, screen=_some(fit.batches))
    folds: list[Fold] = []
    for fold in greedy.folds(said):
        folds.append(fold)
        points.append(judge.point(work.model, folds))
        said(f"{fold.action} {len(folds)} of {len(work.joints)}: {judge.describe(points[-1])}")
    chosen = max((point for point in points if judge.allows(point)), key=lambda point: point.folded)
    student: AdaptedModel | None = None
    if fit.finetune_epochs:
        student, chosen = _refine_most(model, reference, folds, judge, points, chosen, fit, said)
    done = folds[: chosen.folded]
    built = _build(model, work, done, student)
    grown = () if as_deltas else _new_biases(model, built, done)
    notes = move_biases(built, built.graph, grown)
    settled = settle_rows(
        rows,
        work.joints,
        greedy.measured,
        folds,
        chosen.folded,
        before=partial(work.plain_of, model),
        after=built,
        notes=notes,
        fit=fit,
        refined=student is not None,
    )
    # new biases that no norm could take are parameters; the other points are counted without them
    parameters = cost(built, built.preprocessing.input_size, training=False).parameters
    return Fitted(model=built, rows=settled, frontier=_mark(points, chosen, parameters))


def _check(fit: Fit) -> int:
    """Count the pictures to fit on, and refuse what could not be judged in the end."""
    for batch in itertools.chain(fit.batches, fit.judged):
        if not (
            isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(item, Tensor) for item in batch)
        ):
            kind = f"a {type(batch).__name__}"
            raise UsageError(f"a batch is {kind}, expected pictures and labels", hint="labels of -1 are none")
    pictures = sum(len(images) for images, _ in fit.batches)
    if pictures < _LEAST_PICTURES:
        raise UsageError(f"{pictures} pictures to fit on, expected at least {_LEAST_PICTURES}")
    if not any(len(images) for images, _ in fit.judged):
        raise UsageError("there are no pictures to judge on")
    if fit.tolerance.metric == "top1" and not any(bool((labels >= 0).any()) for _, labels in fit.judged):
        raise UsageError(
            "a tolerance on top-1 needs labels, and the judged pictures have none", hint="try disagreement=0.5%"
        )
    return pictures


def _say_nothing(line: str) -> None:
    pass


def _some(batches: Batches) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A few pictures of every batch, in one: files often come class by class."""
    number = sum(1 for _ in batches)
    share = -(-_SCREENED // number)
    # copies: a loader may write into its memory again
    taken = [(images[:share].clone(), labels[:share].clone()) for images, labels in batches]
    return [(torch.cat([images for images, _ in taken]), torch.cat([labels for _, labels in taken]))]


class _Judge:
    """Measures points of the frontier on the judged pictures, against the unmerged model."""

    def __init__(self, reference: Workbench, rows: Sequence[SiteMerge], fit: Fit) -> None:
        self.fit = fit
        self.wanted: Answers = answer(reference.model, fit.judged)
        whole = cost(reference.model, reference.model.preprocessing.input_size, training=False)
        self.parameters, self.macs = whole.parameters, whole.macs
        self.names = [joint.insertion.site.name for joint in reference.joints]
        self.staying = [row for row in rows if row.status in STAYING]

    def point(self, model: nn.Module, folds: Sequence[Fold], *, refined: bool = False) -> FrontierPoint:
        found = answer(model, self.fit.judged)
        difference = compare(found, self.wanted)
        gone = [self.staying[fold.index] for fold in folds]
        return FrontierPoint(
            folded=len(folds),
            site=self.names[folds[-1].index] if folds else "",
            action=folds[-1].action if folds else "",
            images=len(found.logits),
            top1=found.top1,
            agreement=difference.agreement,
            max_logit_error=difference.max_logit_error,
            logit_error=difference.logit_error,
            parameters=self.parameters - sum(row.parameters_after for row in gone),
            macs=self.macs - sum(row.macs_after for row in gone),
            refined=refined,
        )

    def allows(self, point: FrontierPoint) -> bool:
        lost = None if point.top1 is None or self.wanted.top1 is None else self.wanted.top1 - point.top1
        return self.fit.tolerance.allows(
            top1_lost=lost, disagreement=1 - point.agreement, max_logit_error=point.max_logit_error
        )

    def describe(self, point: FrontierPoint) -> str:
        quality = f"agreement {point.agreement:.2%}" if point.top1 is None else f"top-1 {point.top1:.2%}"
        return f"{point.site}, {quality}, logits off by {point.logit_error:.1%}"


def _refine_most(
    model: AdaptedModel,
    reference: Workbench,
    folds: Sequence[Fold],
    judge: _Judge,
    points: list[FrontierPoint],
    chosen: FrontierPoint,
    fit: Fit,
    said: Callable[[str], None],
) -> tuple[AdaptedModel | None, FrontierPoint]:
    """Find the most folds that a refined model is within the tolerance with, by halving what is left."""
    student: AdaptedModel | None = None
    low, high, number = chosen.folded, len(folds) + 1, len(folds)
    while low < number < high:
        tried = Workbench(model, computed=bool(reference.computed))
        for fold in folds[:number]:
            tried.apply(fold)
        gone = {tried.joints[fold.index].path for fold in folds[:number]}
        paths = [*total_changes(folds[:number]), *(joint.path for joint in tried.joints if joint.path not in gone)]
        said(f"refining the model with {number} of {len(folds)} folded")
        refine(tried.model, reference.model, fit.batches, paths=paths, epochs=fit.finetune_epochs, on_progress=said)
        point = judge.point(tried.model, folds[:number], refined=True)
        points.append(point)
        said(f"refined with {number} folded: {judge.describe(point)}")
        if judge.allows(point):
            low, student, chosen = number, tried.model, point
        else:
            high = number
        number = (low + high) // 2
    if student is None:
        said("refining brought no more adapters within the tolerance: the model stays as it was folded")
    return student, chosen


def _build(model: AdaptedModel, work: Workbench, folds: Sequence[Fold], student: AdaptedModel | None) -> AdaptedModel:
    """The model in fp64 with some folds done: from the weights as they were, or as they were refined."""
    base = bare_base(model)
    layers: dict[str, nn.Module] = {}
    for path, change in total_changes(folds).items():
        if student is not None:
            layers[path] = copy.deepcopy(student.get_submodule(path)).double()
        else:
            layers[path] = copy.deepcopy(work.plain_of(model, path))
            add_change(layers[path], change)
    gone = {work.joints[fold.index].path for fold in folds}
    staying = [
        (insertion, (student or model).get_submodule(adapter_path(insertion)))
        for insertion in model.plan.insertions
        if adapter_path(insertion) not in gone
    ]
    return rebuild(model, base, survey_again(model, base), staying=staying, layers=layers)


def _new_biases(model: AdaptedModel, built: AdaptedModel, folds: Sequence[Fold]) -> list[str]:
    """The layers that took a kernel up and have a bias for it, which they had not."""
    paths = sorted(total_changes(folds))
    return [path for path in paths if bias_of(model, path) is None and bias_of(built, path) is not None]


def _mark(points: Sequence[FrontierPoint], chosen: FrontierPoint, parameters: int) -> tuple[FrontierPoint, ...]:
    """The points in order, the chosen one marked, with the parameters of the model that was built for it."""
    ordered = sorted(points, key=lambda point: (point.folded, point.refined))
    marked = replace(chosen, chosen=True, parameters=parameters)
    return tuple(marked if point is chosen else point for point in ordered)
