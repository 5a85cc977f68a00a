"""A merge as differences: what adapters became in the base's layers, told as what to add to the base's own tensors.

So a merged model is an adapter file again, for the same base: the base keeps its identity, switched off it is the base
bit for bit, and what was merged is no module any more. Whether the two compute the same is found out by running both.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from cadapt.adapted import ADAPTERS, AdaptedModel, disabled
from cadapt.backbone import Backbone
from cadapt.bundle import Bundle
from cadapt.errors import CadaptError, UsageError
from cadapt.graph.shift import Readers
from cadapt.merging.rebuild import bare_base, survey_again
from cadapt.merging.whole import compare_logits, make_batch
from cadapt.plan import Plan
from cadapt.surgery import adapter_path, operate

# of the largest logit, both in fp64: what rounding the differences to fp32 may come to, and no more
BOUND_ROUNDED = 1e-4
_DELTA = f"{ADAPTERS}.delta."


def to_deltas(model: AdaptedModel, merged: AdaptedModel) -> AdaptedModel:
    """Tell a merged model as differences to the base of the model it was made from.

    Args:
        model: the adapted model, unmerged; left as it is.
        merged: what :func:`cadapt.merge` made of it with ``as_deltas=True``, in the model's dtype or fp64; left as it
            is.

    Returns:
        An adapted model on the same base, on the CPU in the model's dtype and in eval mode. Its plan holds the adapters
        that stay and names each of the base's tensors that changed; the differences are computed in fp64 and rounded
        once. :func:`cadapt.save` writes it, with the classes and the training record, which a note of the merge joins.

    Raises:
        UsageError: ``merged`` is in a lower precision, or was made of another model.
        CadaptError: a layer became another one, which no difference to its tensors can say.

    >>> import cadapt, timm
    >>> base = timm.create_model("test_resnet").eval()
    >>> adapted = cadapt.insert(base, scheme="conv-par", activation="identity", num_classes=3)
    >>> merged, report = cadapt.merge(adapted, as_deltas=True)
    >>> small = to_deltas(adapted, merged)
    >>> len(small.plan.insertions), small.plan.base == adapted.plan.base
    (0, True)
    """
    _check(model, merged)
    private = copy.deepcopy(model).cpu().eval()
    changes = differences(private, merged)
    plan = replace(merged.plan, base=model.plan.base, deltas=_names(changes, private, merged))
    with disabled(private):
        base = bare_base(private)
        backbone = Backbone(model=base, base=plan.base, preprocessing=model.preprocessing)
        built = operate(backbone, plan, survey_again(private, base)).eval()
    _fill(built, merged, changes)
    built.classes = merged.classes
    total, left = len(model.plan.insertions), len(plan.insertions)
    note = f"{total - left} of {total} adapters became differences to the base, of {len(plan.deltas)} tensors in all"
    built.training_record = {**model.training_record, "merged": note}
    _require_equal(built, merged)
    return built


def as_bundle(model: AdaptedModel, merged: AdaptedModel) -> Bundle:
    """The adapter file's content of a merge, unchecked: what it would hold and weigh, were every change a difference.

    Arguments as of :func:`to_deltas`, but merged in any way.
    """
    changes, dtype = differences(model, merged), next(model.parameters()).dtype
    named = {f"{_DELTA}{name.replace('.', '__')}": value for name, value in changes.items()}
    tensors = {**merged.trained_tensors(), **named}
    return Bundle(
        plan=replace(merged.plan, base=model.plan.base, deltas=tuple(changes)),
        classes=merged.classes,
        preprocessing=merged.preprocessing,
        training=dict(merged.training_record),
        tensors={name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()},
    )


def differences(model: AdaptedModel, merged: AdaptedModel) -> dict[str, torch.Tensor]:
    """What a merge changed of the base's own tensors, in fp64 on the CPU, by the base's names.

    A tensor that the base lacks, or has in another shape, is given whole. Tensors that the plan tunes in place are left
    out: their values stand for themselves.
    """
    before, after = _base_tensors(model), _base_tensors(merged)
    tuned = set(model.trained_tensors())
    found = {}
    for name, value in after.items():
        if name in tuned or not value.is_floating_point():
            continue
        new, own = value.detach().cpu().double(), before.get(name)
        difference = new if own is None or own.shape != new.shape else new - own.detach().cpu().double()
        if name not in before or bool(difference.any()):
            found[name] = difference
    return found


def _base_tensors(model: AdaptedModel) -> dict[str, torch.Tensor]:
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tensor for name, tensor in named if not name.startswith(f"{ADAPTERS}.")}


def _check(model: AdaptedModel, merged: AdaptedModel) -> None:
    own, theirs = (next(item.parameters()).dtype for item in (model, merged))
    if theirs not in (own, torch.float64):
        raise UsageError(
            f"a model merged to {theirs} rounded the base's tensors too, expected {own} or torch.float64",
            hint=f"cadapt.merge(model, dtype={own}, as_deltas=True)",
        )
    if merged.plan.base.name != model.plan.base.name or merged.plan.scheme != model.plan.scheme:
        raise UsageError(
            f"a merged {merged.plan.base.name} with {merged.plan.scheme} was not made of this {model.plan.base.name} "
            f"with {model.plan.scheme}"
        )


def _names(changes: Mapping[str, torch.Tensor], model: AdaptedModel, merged: AdaptedModel) -> tuple[str, ...]:
    """The names under which the graph reads what changed; each changed tensor must be read, and be as it was."""
    before, modules = _base_tensors(model), dict(merged.named_modules(remove_duplicate=False))
    for path, module in bare_base(model).named_modules(remove_duplicate=False):
        if path and type(modules.get(path)) is not type(module):
            raise _no_difference(path, f"was a {type(module).__name__} and is a {type(modules.get(path)).__name__}")
    readers = Readers(model.base_graph, model)
    read = {id(before[name]) for name in readers.names if name in before}
    names = []
    for name, value in changes.items():
        if name in readers.names and readers.names[name][0] == tuple(value.shape):
            names.append(name)
        elif name not in before or id(before[name]) not in read or before[name].shape != value.shape:
            raise _no_difference(name, "changed in a way that adding to it where it is read cannot do")
    return tuple(names)


def _no_difference(name: str, problem: str) -> CadaptError:
    return CadaptError(
        f"the merged model is no sum of the base and differences: '{name}' {problem}",
        hint="merge with as_deltas=True, which keeps such adapters as they are",
    )


@torch.no_grad()
def _fill(built: AdaptedModel, merged: AdaptedModel, changes: Mapping[str, torch.Tensor]) -> None:
    """Give the differences, the adapters that stay, the head and what is tuned in place their values."""
    for name in built.plan.deltas:
        built.get_parameter(f"{_DELTA}{name.replace('.', '__')}").copy_(changes[name])
    staying = [adapter_path(insertion) for insertion in built.plan.insertions]
    for path in (*staying, *_head_path(built.plan)):
        built.get_submodule(path).load_state_dict(merged.get_submodule(path).state_dict())
    values: dict[str, Any] = _base_tensors(merged)
    for name, tensor in built.trained_tensors().items():
        if not name.startswith(f"{ADAPTERS}."):
            tensor.copy_(values[name])


def _head_path(plan: Plan) -> tuple[str, ...]:
    return () if plan.head is None else (f"{ADAPTERS}.head",)


def _require_equal(built: AdaptedModel, merged: AdaptedModel) -> None:
    precise, wanted = (copy.deepcopy(item).cpu().double().eval() for item in (built, merged))
    found = compare_logits(wanted, precise, make_batch(precise, None))
    if not found.error <= BOUND_ROUNDED * found.scale:
        raise CadaptError(
            f"the merged {built.plan.base.name} is not delivered as differences: its logits differ by "
            f"{found.error:.1e} on a scale of {found.scale:.1e}, expected at most {BOUND_ROUNDED:.0e} of it"
        )
