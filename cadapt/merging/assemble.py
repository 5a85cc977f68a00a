"""The merge of a whole model: decide every adapter, build the model that is left, and compare the two end to end.

All of it happens on private copies in fp64 on the CPU; the result is rounded once, to the dtype asked for. The model
given is never touched.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from cadapt.adapted import ADAPTERS, AdaptedModel
from cadapt.backbone import Backbone
from cadapt.costing import cost
from cadapt.errors import CadaptError, UsageError
from cadapt.graph.sites import locate_sites
from cadapt.hashing import hash_tensors
from cadapt.merging.bias import move_biases
from cadapt.merging.checkpoint import why_not_timm
from cadapt.merging.differences import absorb_deltas, bias_of, describe_deltas, new_biases
from cadapt.merging.report import EndToEnd, MergeReport, SiteMerge
from cadapt.merging.sites import BOUND_FP64, Decision, decide, find_obstacle
from cadapt.merging.whole import Logits, compare_logits, effect_on_logits, make_batch
from cadapt.plan import Base
from cadapt.planning import Survey
from cadapt.surgery import adapter_path, operate

BOUND_END_TO_END = 1e-10


def merge(
    model: AdaptedModel, *, dtype: torch.dtype = torch.float32, images: torch.Tensor | None = None
) -> tuple[AdaptedModel, MergeReport]:
    """Fold a trained model's adapters into its base where that is exact, simplify the others, and prove it.

    Args:
        model: the adapted model, left as it was.
        dtype: of the merged model. Its weights are computed in fp64 and rounded to it once.
        images: normalised pictures ``[B, C, H, W]`` to compare the models on; None means random ones.

    Returns:
        The merged model, in eval mode on the argument's device, and the report. The model is an ordinary one: its plan
        holds the adapters that stay, and where a layer changed its base has an identity of its own, so that an adapter
        file made from it is refused on the old base.

    Raises:
        UsageError: ``dtype`` is no floating type, or the pictures are not of the model's kind.
        CadaptError: the model has no data (meta device) or is switched off, or the merged model as a whole computes
            something else.

    >>> import cadapt, timm
    >>> base = timm.create_model("test_resnet").eval()
    >>> merged, report = merge(cadapt.insert(base, scheme="conv-par", activation="identity"))
    >>> report.merged, report.total
    (7, 7)
    """
    _check(model, dtype, images)
    device = next(model.parameters()).device
    adapted = copy.deepcopy(model).cpu().double().eval()
    plain = _bare_base(adapted)
    base = absorb_deltas(plain, adapted)
    surveyed = Survey(graph=adapted.base_graph, located=locate_sites(adapted.base_graph, base))
    decisions = _decide_all(adapted, base, surveyed)
    merged = _assemble(adapted, base, surveyed, decisions)
    new = [path for path in new_biases(plain, model.plan.deltas) if bias_of(base, path) is not None]
    rows = _settle_biases(merged, plain, decisions, new)
    batch = make_batch(adapted, images)
    exact = compare_logits(adapted, merged, batch)
    _require_equal(exact, adapted)
    effect = effect_on_logits(adapted, batch)
    merged.to(dtype)
    # what the scheme tuned of the base can still be switched off
    merged._pristine = {name: value.to(dtype) for name, value in adapted._pristine.items()}
    if model.plan.deltas or any(row.status == "exact" for row in rows):
        merged.plan = replace(merged.plan, base=_identify(merged))
    rounded = compare_logits(adapted.to(dtype), merged, batch.to(dtype))
    end_to_end = EndToEnd(
        images=len(batch),
        random_images=images is None,
        max_abs_error_fp64=exact.error,
        max_abs_error=rounded.error,
        logit_scale=exact.scale,
        logit_effect=effect,
        agreement=rounded.agreement,
    )
    summary = _summary(model, rows)
    if model.plan.deltas:
        taken = describe_deltas(len(model.plan.deltas), new, merged)
        summary = f"{summary}; {taken}" if rows else taken
    report = _report(model, merged, rows, end_to_end, summary)
    return merged.to(device), report


def _check(model: AdaptedModel, dtype: torch.dtype, images: torch.Tensor | None) -> None:
    if not dtype.is_floating_point:
        raise UsageError(f"cannot merge to {dtype}, expected a floating type such as torch.float32")
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise CadaptError("cannot merge a model on the meta device: it has no weights")
    if not model._enabled:
        raise CadaptError("cannot merge a model whose adapters are switched off")
    channels = model.preprocessing.input_size[0]
    if images is not None and (images.dim() != 4 or len(images) == 0 or images.shape[1] != channels):
        raise UsageError(f"the pictures have shape {tuple(images.shape)}, expected [B, {channels}, H, W]")


def _bare_base(model: AdaptedModel) -> nn.Module:
    """A module that holds what the base holds, under the same names; the tensors are the model's own."""
    base = nn.Module()
    base._modules.update({name: child for name, child in model._modules.items() if name != ADAPTERS})
    base._parameters.update(model._parameters)
    base._buffers.update(model._buffers)
    base._non_persistent_buffers_set.update(model._non_persistent_buffers_set)
    return base.eval()


def _decide_all(model: AdaptedModel, base: nn.Module, surveyed: Survey) -> tuple[Decision, ...]:
    """Decide the adapters in the order in which they were joined, each on the layer the ones before it left."""
    modules = dict(base.named_modules(remove_duplicate=False))
    outputs = {(item.site.kind, item.site.path, item.site.call): item.output for item in surveyed.located}
    staying: set[object] = set()
    layers: dict[str, nn.Module] = {}
    decisions = []
    for insertion in model.plan.insertions:
        site = insertion.site
        output = outputs[site.kind, site.path, site.call]
        obstacle = find_obstacle(site.path, modules, surveyed.graph)
        if output in staying:
            # what that adapter reads or adds to would not be what it was trained on
            obstacle = "another adapter that joined here before it stays"
        layer = layers.get(site.path, modules.get(site.path))
        decision = decide(insertion, model.get_submodule(adapter_path(insertion)), layer, obstacle)
        if decision.layer is None:
            staying.add(output)
        else:
            layers[site.path] = decision.layer
        decisions.append(decision)
    return tuple(decisions)


def _assemble(model: AdaptedModel, base: nn.Module, surveyed: Survey, decisions: Sequence[Decision]) -> AdaptedModel:
    """Operate by the plan that is left, then give the layers and adapters their values."""
    staying = [decision for decision in decisions if decision.layer is None]
    plan = replace(model.plan, insertions=tuple(decision.insertion for decision in staying), deltas=())
    backbone = Backbone(model=base, base=plan.base, preprocessing=model.preprocessing)
    merged = operate(backbone, plan, surveyed)
    for decision in decisions:
        if decision.layer is not None:
            merged.set_submodule(decision.insertion.site.path, copy.deepcopy(decision.layer))
        else:
            assert decision.adapter is not None
            merged.get_submodule(adapter_path(decision.insertion)).load_state_dict(decision.adapter.state_dict())
    if plan.head is not None:
        path = f"{ADAPTERS}.head"
        merged.get_submodule(path).load_state_dict(model.get_submodule(path).state_dict())
    merged.classes = model.classes
    merged.training_record = dict(model.training_record)
    return merged.eval()


def _settle_biases(
    merged: AdaptedModel, base: nn.Module, decisions: Sequence[Decision], new: Sequence[str]
) -> tuple[SiteMerge, ...]:
    """Move biases that the base's layers had not to where they belong, and say so in the rows.

    ``new`` are the layers to which a learned difference gave one.
    """
    paths = [decision.insertion.site.path for decision in decisions if decision.layer is not None]
    grown = {path for path in (*paths, *new) if bias_of(base, path) is None and bias_of(merged, path) is not None}
    notes = move_biases(merged, merged.graph, sorted(grown))
    rows = []
    for decision in decisions:
        row, path = decision.row, decision.insertion.site.path
        if decision.layer is not None and path in notes:
            gone = bias_of(merged, path) is None
            row = replace(row, note=notes[path], parameters_after=0 if gone else row.parameters_after)
        rows.append(row)
    return tuple(rows)


def _require_equal(found: Logits, adapted: AdaptedModel) -> None:
    if found.error <= BOUND_END_TO_END * max(found.scale, 1.0):
        return
    raise CadaptError(
        f"the merged {adapted.plan.base.name} is not delivered: its logits differ by {found.error:.1e} in fp64 on a "
        f"scale of {found.scale:.1e}, expected at most {BOUND_END_TO_END:.0e}",
        hint="logits that are no numbers mean that the training diverged" if found.error != found.error else None,
    )


def _identify(merged: AdaptedModel) -> Base:
    """The identity of a base whose layers took adapters up."""
    head = merged.plan.head
    state: Mapping[str, torch.Tensor] = merged.state_dict()
    skipped = (f"{ADAPTERS}.", *(f"{path}." for path in (head.paths if head is not None else ())))
    tensors = {name: tensor for name, tensor in state.items() if not name.startswith(skipped)}
    parameters = {name for name, _ in merged.named_parameters()} & tensors.keys()
    return replace(
        merged.plan.base,
        source="given",
        parameters=sum(tensors[name].numel() for name in parameters),
        sha256=hash_tensors(tensors.items()),
        checkpoint=None,
        seed=None,
        probe=(),
    )


def _report(
    model: AdaptedModel, merged: AdaptedModel, rows: tuple[SiteMerge, ...], end_to_end: EndToEnd, summary: str
) -> MergeReport:
    before = cost(model, model.preprocessing.input_size, training=False)
    after = cost(merged, merged.preprocessing.input_size, training=False)
    reason = why_not_timm(merged)
    return MergeReport(
        base=model.plan.base.name,
        scheme=model.plan.scheme,
        dtype=str(next(merged.parameters()).dtype).removeprefix("torch."),
        summary=summary,
        sites=rows,
        parameters_before=before.parameters,
        parameters_after=after.parameters,
        macs_before=before.macs,
        macs_after=after.macs,
        end_to_end=end_to_end,
        verified=_is_verified(rows, end_to_end),
        differences=len(model.plan.deltas),
        timm_loadable=reason is None,
        timm_reason=reason or "",
    )


def _is_verified(rows: Sequence[SiteMerge], end_to_end: EndToEnd) -> bool:
    changed = [row.error_fp64 for row in rows if row.status in ("exact", "simplified")]
    within = all(error is not None and error <= BOUND_FP64 for error in changed)
    bound = BOUND_END_TO_END * max(end_to_end.logit_scale, 1.0)
    return within and end_to_end.max_abs_error_fp64 <= bound


def _summary(model: AdaptedModel, rows: Sequence[SiteMerge]) -> str:
    if not rows and model.plan.trainable:
        return "nothing to merge: the trained tensors are the base's own, so it is already one model"
    if not rows:
        return "nothing to merge: no adapter was inserted, only the head is the task's"
    merged = sum(row.status == "exact" for row in rows)
    return f"{merged} of {len(rows)} adapters fold into the base exactly"
