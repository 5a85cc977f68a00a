"""Whether trained adapters of one base can be one: their conflicts, and what their combinations are worth on pictures.

Each adapter's pictures are read once, and all models run over them together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch

from cadapt.adapted import AdaptedModel
from cadapt.adapters import Refusal
from cadapt.backbone import check_identity
from cadapt.bundle import Bundle
from cadapt.combining import METHODS, CombineReport, Settings, check_tasks
from cadapt.combining.assemble import Combination, Tasks, check_same_base, finish, make_combination, void_error
from cadapt.combining.conflicts import compare_places, compare_vectors
from cadapt.combining.heads import JoinedHead, join_heads
from cadapt.combining.judge import Judged, judge
from cadapt.combining.methods import get_method
from cadapt.combining.report import CombinationFigures, TaskFacts
from cadapt.combining.settings import shares
from cadapt.combining.vectors import norm
from cadapt.combining.verdict import best_of, chosen_by, judge_measured, judge_vectors
from cadapt.data import evaluation_batches
from cadapt.errors import CadaptError, RefusedError, UsageError
from cadapt.jobs.merge_data import open_judged
from cadapt.jobs.task import Progress, default_workers
from cadapt.library import base_of, from_bundle, to_bundle
from cadapt.train.hardware import resolve_device

# what is written where nothing was measured
_UNMEASURED = "ties"


@dataclass(frozen=True, kw_only=True)
class CombineOptions:
    """How adapters are compared and combined.

    Args:
        settings: the methods' numbers.
        method: the one method to try; None tries all.
        data: a source of pictures for each adapter, in their order; none compares the task vectors only.
        apply: a combined adapter is wanted.
        device: ``auto``, or a device's name.
        workers: processes that read pictures; None chooses.
        batch_size: pictures at a time.
        skip_bad: leave unreadable pictures out.
    """

    settings: Settings
    method: str | None = None
    data: tuple[str, ...] = ()
    apply: bool = False
    device: str = "auto"
    workers: int | None = None
    batch_size: int = 64
    skip_bad: bool = False


@dataclass(frozen=True, kw_only=True)
class Combined:
    """What was found, and the combined adapter file's content where it was asked for."""

    report: CombineReport
    bundle: Bundle | None


def name_tasks(paths: Sequence[Path]) -> tuple[str, ...]:
    """A name for each adapter file: its stem, with its folder where two stems are the same, with a number after that.

    >>> name_tasks([Path("pets.safetensors"), Path("a/cars.safetensors"), Path("b/cars.safetensors")])
    ('pets', 'a-cars', 'b-cars')
    """
    stems = Counter(path.stem for path in paths)
    names = [f"{path.resolve().parent.name}-{path.stem}" if stems[path.stem] > 1 else path.stem for path in paths]
    taken = Counter[str]()
    unique = []
    for name in names:
        taken[name] += 1
        unique.append(name if taken[name] == 1 else f"{name}-{taken[name]}")
    return tuple(unique)


def combine_bundles(
    bundles: Mapping[str, Bundle],
    options: CombineOptions,
    *,
    checkpoint: Path | None = None,
    near: Path | None = None,
    on_note: Callable[[str], None] | None = None,
    on_progress: Progress | None = None,
) -> Combined:
    """Compare adapters of one base, judge their combinations, and combine them where that is asked for.

    Args:
        bundles: the adapter files' contents by the names that reports call them by, two or more.
        options: what to do.
        checkpoint: the base's weights, where they are not where they last were.
        near: a folder to look for them in.
        on_note: called with a line of what is being done.
        on_progress: called with how many pictures are decoded and how many there are.

    Raises:
        UsageError: an unknown method or device, another number of weights or sources than of adapters, or adapters
            that do not fold differ.
        RefusedError: bases or (with ``apply``) heads differ; unreadable pictures.
        CadaptError: an adapter was never trained, the base's weights cannot be had, or all that was learned cancels.
    """
    methods = [get_method(options.method).name] if options.method is not None else list(METHODS)
    place = resolve_device(options.device)
    _check(bundles, options)
    note = on_note or (lambda line: None)
    tasks = check_tasks(_load(bundles, checkpoint, near))
    joined = join_heads(tasks.models, shares(options.settings.weights))
    if options.apply and isinstance(joined, Refusal):
        raise RefusedError(f"no head for all classes: {joined.reason}", hint="train them with equal head options")
    if not options.data and not options.apply:
        return Combined(report=_report(tasks, joined, options, {}, {}), bundle=None)
    chosen = methods if options.data else [options.method or _UNMEASURED]
    note(f"combining {len(bundles)} adapters by {', '.join(chosen)}")
    made = _make(tasks, chosen, options.settings, note)
    head = joined if isinstance(joined, JoinedHead) else None
    judged = _judge_all(tasks, made, head, options, place, note, on_progress) if options.data else {}
    report = _report(tasks, joined, options, made, judged)
    if not options.apply:
        return Combined(report=report, bundle=None)
    bundle = to_bundle(finish(tasks, made[report.best]))
    return Combined(report=replace(report, applied=report.best), bundle=bundle)


def _make(
    tasks: Tasks, methods: Sequence[str], settings: Settings, note: Callable[[str], None]
) -> dict[str, Combination]:
    """The methods' combinations but those in which everything cancelled."""
    made = {name: make_combination(tasks, name, settings) for name in methods}
    void = [name for name, item in made.items() if item.is_void]
    if len(void) == len(made):
        raise void_error(void, settings)
    if void:
        note(f"left out, since the adapters cancel each other: {', '.join(void)}")
    return {name: item for name, item in made.items() if not item.is_void}


def _check(bundles: Mapping[str, Bundle], options: CombineOptions) -> None:
    """Refuse what need not be loaded to be refused."""
    if len(options.settings.weights) != len(bundles):
        raise UsageError(
            f"got {len(options.settings.weights)} weights for {len(bundles)} adapters", hint="--weights 1,1: one each"
        )
    if options.data and len(options.data) != len(bundles):
        raise UsageError(
            f"got --data {len(options.data)} times for {len(bundles)} adapters",
            hint="give one for each adapter, in their order, or none to compare the adapters only",
        )
    for name, bundle in bundles.items():
        if not bundle.classes:
            raise CadaptError(f"'{name}' was not trained: it has no classes yet", hint="cadapt train DATA -m FILE")
    for (one, first), (two, second) in pairwise(bundles.items()):
        check_same_base(one, first.plan, two, second.plan)


def _load(bundles: Mapping[str, Bundle], checkpoint: Path | None, near: Path | None) -> dict[str, AdaptedModel]:
    backbone = base_of(next(iter(bundles.values())), checkpoint=checkpoint, near=near)
    models = {}
    for name, bundle in bundles.items():
        own = check_identity(replace(backbone, preprocessing=bundle.preprocessing), bundle.plan.base)
        models[name] = from_bundle(bundle, own)
    return models


def _judge_all(
    tasks: Tasks,
    made: Mapping[str, Combination],
    joined: JoinedHead | None,
    options: CombineOptions,
    device: torch.device,
    note: Callable[[str], None],
    on_progress: Progress | None,
) -> dict[str, Judged]:
    workers = default_workers() if options.workers is None else options.workers
    sources = [
        open_judged(source, model.classes, skip_bad=options.skip_bad, workers=workers, on_progress=on_progress)
        for source, model in zip(options.data, tasks.models.values(), strict=True)
    ]
    found, start = {}, 0
    for number, ((name, model), images) in enumerate(zip(tasks.models.items(), sources, strict=True)):
        note(f"judging on the {len(images)} pictures of {name}")
        found[name] = judge(
            model,
            {method: item.model for method, item in made.items()},
            evaluation_batches(images, model.preprocessing, options.batch_size, workers),
            columns=slice(start, start + len(model.classes)),
            task=number,
            joined=joined,
            device=device,
        )
        start += len(model.classes)
    return found


def _report(
    tasks: Tasks,
    joined: JoinedHead | Refusal,
    options: CombineOptions,
    made: Mapping[str, Combination],
    judged: Mapping[str, Judged],
) -> CombineReport:
    density = options.settings.density
    weighted = {
        name: vector.times(weight)
        for (name, vector), weight in zip(tasks.vectors.items(), options.settings.weights, strict=True)
    }
    overall = compare_vectors({name: vector.entries for name, vector in weighted.items()}, density)
    combinations = tuple(_figures(name, options.settings, judged) for name in made) if judged else ()
    facts = _facts(tasks, options, judged)
    best = best_of(combinations)
    plans = [model.plan for model in tasks.models.values()]
    kept = any(vector.insertions for vector in tasks.vectors.values())
    return CombineReport(
        base=plans[0].base.name,
        tasks=facts,
        places=compare_places(weighted, density, {name: model.plan.scheme for name, model in tasks.models.items()}),
        overall=overall,
        density=density,
        seeds_differ=kept and len({plan.seed for plan in plans}) > 1,
        head="none" if isinstance(joined, Refusal) else "averaged" if joined.averaged else "stacked",
        head_reason=joined.reason if isinstance(joined, Refusal) else "",
        classes=() if isinstance(joined, Refusal) else joined.classes,
        combinations=combinations,
        best=best.method if best is not None else options.method or _UNMEASURED,
        chosen_by="--method" if options.method is not None else chosen_by(combinations),
        verdict=judge_vectors(overall) if best is None else judge_measured(facts, best),
    )


def _facts(tasks: Tasks, options: CombineOptions, judged: Mapping[str, Judged]) -> tuple[TaskFacts, ...]:
    sources = options.data or (None,) * len(tasks.models)
    return tuple(
        TaskFacts(
            name=name,
            scheme=model.plan.scheme,
            classes=len(model.classes),
            seed=model.plan.seed,
            folded=len(model.plan.insertions) - len(tasks.vectors[name].insertions),
            kept=len(tasks.vectors[name].insertions),
            norm=norm(tasks.vectors[name].entries),
            data=source,
            images=judged[name].images if judged else None,
            top1=judged[name].alone if judged else None,
        )
        for (name, model), source in zip(tasks.models.items(), sources, strict=True)
    )


def _figures(method: str, settings: Settings, judged: Mapping[str, Judged]) -> CombinationFigures:
    return CombinationFigures(
        method=method,
        settings=get_method(method).describe(settings),
        known=tuple(item.known[method] for item in judged.values()),
        open=tuple(item.open[method] for item in judged.values()),
    )
