"""Building the combined model: one base, the combined differences and adapters, and the tasks' heads.

It is an ordinary adapted model on the same base: what was learned of the base's tensors is a learned difference of its
plan, so that the adapter file loads wherever the tasks' files do. The tasks' models are never changed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from cadapt.adapted import ADAPTERS, AdaptedModel, disabled
from cadapt.adapters import Refusal
from cadapt.backbone import Backbone
from cadapt.combining.heads import HEAD, JoinedHead, SideBySide, join_heads
from cadapt.combining.methods import Settings, get_method
from cadapt.combining.settings import shares
from cadapt.combining.vectors import TaskVector, Vector, norm, task_vector, weighted_sum
from cadapt.errors import CadaptError, RefusedError, UsageError
from cadapt.graph.shift import Readers
from cadapt.merging.rebuild import bare_base, survey_again
from cadapt.plan import Head, Insertion, Plan
from cadapt.surgery import operate

# what fp64 leaves of numbers that cancel, with room to spare, and far below what any training changes
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True, eq=False)
class Tasks:
    """Trained models on one base with their task vectors, by name, checked to be combinable."""

    models: Mapping[str, AdaptedModel]
    vectors: Mapping[str, TaskVector]

    @property
    def first(self) -> AdaptedModel:
        """The model from which the base is taken."""
        return next(iter(self.models.values()))


@dataclass(frozen=True, kw_only=True, eq=False)
class Combination:
    """What one method gives: ``model`` with all tasks' own heads side by side, which it is judged by.

    ``is_void`` says that nothing is left of vectors that are not zero: they cancelled each other.
    """

    method: str
    settings: Settings
    vector: Vector
    model: AdaptedModel
    is_void: bool


def combine(models: Mapping[str, AdaptedModel], method: str = "ties", settings: Settings | None = None) -> AdaptedModel:
    """Combine trained models on one base into one that knows the classes of all.

    Args:
        models: two or more, by names of the caller's; they are left as they were.
        method: see :data:`cadapt.combining.METHODS`.
        settings: its numbers; None weighs all tasks by 1.

    Returns:
        The combined model in eval mode, on the first one's device. Its classes are the tasks', one behind the other, or
        the tasks' common ones where they are the same.

    Raises:
        UsageError: there is no such method, or another number of weights than models.
        UsageError: adapters that do not fold differ.
        RefusedError: the models' bases, preprocessing or heads differ.
        CadaptError: the vectors cancel out.
    """
    tasks = check_tasks(models)
    settings = settings or Settings(weights=(1.0,) * len(models))
    return finish(tasks, make_combination(tasks, method, settings))


def check_tasks(models: Mapping[str, AdaptedModel]) -> Tasks:
    """Compute the models' task vectors, and refuse those of which a combination makes no sense.

    Raises:
        UsageError: there are fewer than two models, one has no classes, or their adapters that do not fold differ.
        RefusedError: their bases or their preprocessing differ.
    """
    if len(models) < 2:
        raise UsageError(f"got {len(models)} adapter to combine, expected two or more")
    first_name, first = next(iter(models.items()))
    for name, model in models.items():
        if not model.classes:
            raise UsageError(f"'{name}' has no classes", hint="train it, or set model.classes")
        check_same_base(first_name, first.plan, name, model.plan)
        if model.preprocessing != first.preprocessing:
            raise RefusedError(
                f"'{first_name}' and '{name}' prepare pictures differently: {first.preprocessing.input_size} and "
                f"{model.preprocessing.input_size}, or in their means and crops"
            )
    vectors = {name: task_vector(model) for name, model in models.items()}
    for name, vector in vectors.items():
        _check_same_adapters(first_name, vectors[first_name], name, vector)
    return Tasks(models=models, vectors=vectors)


def check_same_base(first_name: str, first: Plan, name: str, plan: Plan) -> None:
    """Refuse two adapters of different bases, naming both."""
    one, two = first.base, plan.base
    if one.sha256 != two.sha256 or dict(one.settings) != dict(two.settings):
        raise RefusedError(
            f"different bases: '{first_name}' was made for {one.name} with SHA-256 {one.sha256[:12]}…, "
            f"'{name}' for {two.name} with {two.sha256[:12]}…",
            hint="only adapters that were trained on the same base can be combined",
        )


def _check_same_adapters(first_name: str, first: TaskVector, name: str, vector: TaskVector) -> None:
    """Refuse adapters that do not fold unless both have the same ones."""
    ours, theirs = ({_key(item): item for item in v.insertions} for v in (first, vector))
    for key, item in (*ours.items(), *theirs.items()):
        if key in ours and key in theirs:
            continue
        having, lacking, owner = (first_name, name, first) if key in ours else (name, first_name, vector)
        reason = owner.reasons[owner.insertions.index(item)]
        raise UsageError(
            f"cannot combine '{having}' and '{lacking}': {item.scheme} at '{item.site.name}' of '{having}' does not "
            f"fold into the base ({reason}), and '{lacking}' has no equal one there",
            hint="train both by the same scheme with the same settings, or by one that folds, such as lora",
        )


def _key(insertion: Insertion) -> object:
    return insertion.site, insertion.scheme, insertion.form, insertion.settings


def make_combination(tasks: Tasks, method: str, settings: Settings) -> Combination:
    """Combine the vectors by one method, in fp64, and build the model, rounded once.

    Raises:
        UsageError: there is no such method, or another number of weights than tasks.
    """
    if len(settings.weights) != len(tasks.models):
        raise UsageError(
            f"got {len(settings.weights)} weights for {len(tasks.models)} adapters", hint="--weights 1,1: one for each"
        )
    vector = get_method(method).run([item.entries for item in tasks.vectors.values()], settings)
    model = _build(tasks, vector, settings.weights, tasks.first.plan.head)
    _put_heads(model, list(tasks.models.values()))
    is_void = _is_void(tasks, vector, settings.weights)
    return Combination(method=method, settings=settings, vector=vector, model=model, is_void=is_void)


def _is_void(tasks: Tasks, vector: Vector, weights: Sequence[float]) -> bool:
    """Whether no more than rounding is left of vectors that take part and are not zero."""
    parts = zip(tasks.vectors.values(), weights, strict=True)
    given = sum(abs(weight) * norm(item.entries) for item, weight in parts)
    return given > 0 and norm(vector) <= _ROUNDING * given


def finish(tasks: Tasks, combination: Combination) -> AdaptedModel:
    """The combined model with one head for all classes, as a file holds it.

    Raises:
        RefusedError: the heads cannot be joined.
        CadaptError: the vectors cancelled each other.
    """
    if combination.is_void:
        raise void_error([combination.method], combination.settings)
    joined = join_heads(tasks.models, shares(combination.settings.weights))
    if isinstance(joined, Refusal):
        raise RefusedError(f"no head for all classes: {joined.reason}", hint="train them with equal head options")
    model = _build(tasks, combination.vector, combination.settings.weights, joined.head)
    _fill_head(model, joined)
    model.classes = joined.classes
    model.training_record = {
        "combined": {
            "method": combination.method,
            "settings": get_method(combination.method).describe(combination.settings),
            "adapters": list(tasks.models),
        }
    }
    return model


def void_error(methods: Sequence[str], settings: Settings) -> CadaptError:
    """The refusal of a combination in which nothing is left of the tasks."""
    weights = ",".join(f"{weight:g}" for weight in settings.weights)
    return CadaptError(
        f"nothing is left by {', '.join(methods)} with weights {weights}: the adapters cancel each other, "
        "and the file would be the base with another head",
        hint="--weights 1,1: weights of one sign; and a --scale above 0",
    )


@torch.no_grad()
def _build(tasks: Tasks, vector: Vector, weights: Sequence[float], head: Head | None) -> AdaptedModel:
    """Operate on the pristine base by a plan of differences and adapters, and give them the combined values."""
    plan = _plan(tasks, vector, head)
    first = tasks.first
    with disabled(first):
        base = copy.deepcopy(bare_base(first))
    unknown = set(plan.deltas) - Readers(first.base_graph, base).names.keys()
    if unknown:
        name = min(unknown)
        raise RefusedError(f"cannot combine: what was learned at '{name}' has no tensor of {plan.base.name} to add to")
    backbone = Backbone(model=base, base=plan.base, preprocessing=first.preprocessing)
    model = operate(backbone, plan, survey_again(first, base)).eval()
    for name in plan.deltas:
        model.get_parameter(f"{ADAPTERS}.delta.{name.replace('.', '__')}").copy_(vector[name])
    start = weighted_sum([item.initial for item in tasks.vectors.values()], shares(weights))
    for name, value in start.items():
        model.get_parameter(name).copy_(value + vector[name])
    statistics = weighted_sum([item.statistics for item in tasks.vectors.values()], shares(weights))
    for name, value in statistics.items():
        buffer = model.get_buffer(name)
        buffer.copy_(buffer.double().cpu() + value)
    return model


def _plan(tasks: Tasks, vector: Vector, head: Head | None) -> Plan:
    plans = [model.plan for model in tasks.models.values()]
    learned = {name for item in tasks.vectors.values() for name in item.differences}
    equal = all(dict(plan.settings) == dict(plans[0].settings) for plan in plans)
    return Plan(
        base=plans[0].base,
        scheme="+".join(sorted({name for plan in plans for name in plan.scheme.split("+")})),
        settings=plans[0].settings if equal else {},
        insertions=next(iter(tasks.vectors.values())).insertions,
        deltas=tuple(name for name in vector if name in learned and bool(vector[name].any())),
        head=head,
        bn_policy="train" if any(item.statistics for item in tasks.vectors.values()) else "frozen",
        seed=min(plan.seed for plan in plans),
    )


def _put_heads(model: AdaptedModel, models: Sequence[AdaptedModel]) -> None:
    """Put all tasks' own heads in the place of a model's one."""
    head = model.plan.head
    if head is None:
        return
    paths = [f"{HEAD}.{index}" for index in range(len(head.paths))] if head.others else [HEAD]
    for path in paths:
        heads = [copy.deepcopy(item.get_submodule(path)).cpu().float() for item in models]
        model.set_submodule(path, SideBySide(heads).eval())


@torch.no_grad()
def _fill_head(model: AdaptedModel, joined: JoinedHead) -> None:
    head = model.get_submodule(HEAD)
    for name, tensor in head.state_dict().items():
        tensor.copy_(joined.state[name])
