"""The merge of a whole model: fold every adapter that can be, exactly or fitted, and compare the two end to end.

All of it happens on private copies in fp64 on the CPU; the result is rounded once, to the dtype asked for. The model
given is never touched.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from cadapt.adapted import ADAPTERS, AdaptedModel
from cadapt.costing import cost
from cadapt.errors import CadaptError, UsageError
from cadapt.hashing import hash_tensors
from cadapt.merging.checkpoint import why_not_timm
from cadapt.merging.differences import describe_deltas
from cadapt.merging.exact import fold_exact
from cadapt.merging.fitted import Fit, fold_fitted
from cadapt.merging.rebuild import pristine_in
from cadapt.merging.report import EndToEnd, MergeReport, SiteMerge
from cadapt.merging.sites import BOUND_FP64
from cadapt.merging.whole import Logits, compare_logits, effect_on_logits, make_batch
from cadapt.plan import Base

BOUND_END_TO_END = 1e-10


def merge(
    model: AdaptedModel,
    *,
    dtype: torch.dtype = torch.float32,
    images: torch.Tensor | None = None,
    as_deltas: bool = False,
    dense: bool = False,
    fit: Fit | None = None,
) -> tuple[AdaptedModel, MergeReport]:
    """Fold a trained model's adapters into its base where that is exact, simplify the others, and prove it.

    Args:
        model: the adapted model, left as it was.
        dtype: of the merged model. Its weights are computed in fp64 and rounded to it once.
        images: normalised pictures ``[B, C, H, W]`` to compare the models on; None means random ones.
        as_deltas: change only tensors of the base's own layers, so that an adapter file on the same base can hold what
            changed, see :func:`cadapt.merging.to_deltas`.
        dense: fold even where the sum costs more multiply–accumulates than layer and adapter by themselves.
        fit: fold also what is not linear, by kernels fitted on real pictures, within a tolerance; None folds exactly or
            not at all.

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
    folded = fold_exact(adapted, as_deltas=as_deltas, dense=dense)
    merged, rows = folded.model, folded.rows
    batch = make_batch(adapted, images)
    exact = compare_logits(adapted, merged, batch)
    _require_equal(exact, adapted)
    effect = effect_on_logits(adapted, batch)
    fitted = None if fit is None else fold_fitted(merged, rows, fit, as_deltas=as_deltas)
    delivered = exact
    if fitted is not None:
        merged, rows = fitted.model, fitted.rows
        delivered = compare_logits(adapted, merged, batch)
    merged.to(dtype)
    # what the scheme tuned of the base can still be switched off
    merged._pristine = pristine_in(adapted, dtype)
    if model.plan.deltas or any(row.status in ("exact", "fitted") for row in rows):
        merged.plan = replace(merged.plan, base=_identify(merged))
    rounded = compare_logits(adapted.to(dtype), merged, batch.to(dtype))
    end_to_end = EndToEnd(
        images=len(batch),
        random_images=images is None,
        max_abs_error_fp64=delivered.error,
        max_abs_error=rounded.error,
        logit_scale=exact.scale,
        logit_effect=effect,
        agreement=rounded.agreement,
    )
    summary = _summary(model, rows)
    if model.plan.deltas:
        taken = describe_deltas(len(model.plan.deltas), folded.new_biases, merged)
        summary = f"{summary}; {taken}" if rows else taken
    report = _report(model, merged, rows, end_to_end, summary)
    if fit is not None and fitted is not None:
        # the point is chosen among those within it
        report = replace(report, frontier=fitted.frontier, tolerance=str(fit.tolerance), tolerance_met=True)
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
        verified=_is_verified(rows),
        differences=len(model.plan.deltas),
        timm_loadable=reason is None,
        timm_reason=reason or "",
    )


def _is_verified(rows: Sequence[SiteMerge]) -> bool:
    """Whether every exact change passed; that the model as a whole did was required before."""
    changed = [row.error_fp64 for row in rows if row.status in ("exact", "simplified")]
    return all(error is not None and error <= BOUND_FP64 for error in changed)


def _summary(model: AdaptedModel, rows: Sequence[SiteMerge]) -> str:
    if not rows and model.plan.trainable:
        return "nothing to merge: the trained tensors are the base's own, so it is already one model"
    if not rows:
        return "nothing to merge: no adapter was inserted, only the head is the task's"
    merged = sum(row.status == "exact" for row in rows)
    said = f"{merged} of {len(rows)} adapters fold into the base exactly"
    others = [(status, sum(row.status == status for row in rows)) for status in ("fitted", "dropped")]
    return ", ".join([said, *(f"{number} {status}" for status, number in others if number)])
