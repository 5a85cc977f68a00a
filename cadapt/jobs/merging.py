"""Merging an adapter file as ``cadapt merge-report`` does: fold, measure on the user's pictures, and make a file of it.

What is judged is what is delivered: the tensors that are written, in their dtype.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cadapt.adapted import AdaptedModel
from cadapt.bundle import Bundle, bundle_bytes, load_bundle
from cadapt.data import Images
from cadapt.errors import CadaptError
from cadapt.export.latency import compare_models
from cadapt.jobs.comparing import compare_on_data, describe_miss, is_within
from cadapt.jobs.judging import trained_model
from cadapt.jobs.merge_data import PictureBatches, choose_fitted, open_judged
from cadapt.jobs.merge_options import DEFAULT_TOLERANCE, MergeOptions
from cadapt.jobs.shipping import ship_adapter
from cadapt.jobs.task import Progress, default_workers
from cadapt.library import base_of, from_bundle, to_bundle
from cadapt.merging import Fit, MergeReport, OnData, checkpoint_bytes, merge, to_deltas
from cadapt.merging.deltas import as_bundle
from cadapt.merging.forms import forms_of
from cadapt.merging.whole import compare_logits, make_batch
from cadapt.train.hardware import resolve_device

Tell = Callable[[str], None]
_SHOWN_IMAGES = 4


@dataclass(frozen=True, kw_only=True)
class Merged:
    """A merge: its report, what else the JSON says of it, and the file to write.

    ``data`` is None where none was asked for, the tolerance was missed (then ``missed`` is a sentence that says by how
    much), or the model cannot be had in that form (then ``refused`` is the error that says why).
    """

    report: MergeReport
    facts: Mapping[str, Any]
    data: bytes | None = None
    missed: str | None = None
    refused: CadaptError | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        refused = None if self.refused is None else self.refused.message
        return {**self.report.to_json(), **self.facts, "missed": self.missed, "refused": refused}


def merge_bundle(
    bundle: Bundle,
    options: MergeOptions,
    *,
    checkpoint: Path | None = None,
    near: Path | None = None,
    bytes_before: int | None = None,
    tell: Tell | None = None,
    on_progress: Progress | None = None,
) -> Merged:
    """Merge an adapter as far as it goes, and measure what became of it.

    Args:
        bundle: the adapter file's content.
        options: what to do.
        checkpoint: where the base's weights are, if not where they last were.
        near: a folder to look for them in.
        bytes_before: the adapter file's size.
        tell: called with a line for each long phase.
        on_progress: called while pictures are checked, with how many are done and how many there are.

    Raises:
        UsageError: a device or a source of pictures that is unknown.
        RefusedError: the file, the base or the pictures are not what they should be.
        CadaptError: the adapter was never trained, or the model cannot be had in the form asked for.
    """
    job = _Job(bundle, options, tell or _say_nothing)
    return job.run(checkpoint, near, bytes_before, on_progress)


def _say_nothing(line: str) -> None:
    pass


class _Job:
    """One merge, its phases in order."""

    def __init__(self, bundle: Bundle, options: MergeOptions, tell: Tell) -> None:
        self.bundle = bundle
        self.options = options
        self.tell = tell
        self.device = resolve_device(options.device)
        self.workers = default_workers() if options.workers is None else options.workers
        self.fitted_on: dict[str, Any] | None = None

    def run(
        self, checkpoint: Path | None, near: Path | None, bytes_before: int | None, on_progress: Progress | None
    ) -> Merged:
        options = self.options
        adapted = self._build(checkpoint, near)
        judged = None if options.data is None else self._open(options.data, on_progress)
        shown = None if judged is None else self._first_pictures(judged)
        merged, report, judged = self._merge(adapted, judged, shown, on_progress)
        refused: CadaptError | None = None
        try:
            delivered, data = self._deliver(adapted, merged, report, checkpoint, near)
        except CadaptError as error:
            # the report says why, and took its time: it is shown before the refusal
            delivered, data, refused = merged, None, error
        report = self._in_dtype(self._ask_timm(report, delivered), adapted, delivered, shown)
        report = replace(
            report, bytes_before=bytes_before, bytes_after=self._size(adapted, merged) if data is None else len(data)
        )
        missed = None
        if judged is not None:
            report, missed = self._judge(report, adapted, delivered, judged)
        report = self._time(report, adapted, merged)
        facts = {"data": _short(report.on_data), "fit": self.fitted_on}
        return Merged(report=report, facts=facts, data=None if missed else data, missed=missed, refused=refused)

    def _build(self, checkpoint: Path | None, near: Path | None) -> AdaptedModel:
        if self.options.data is not None or self.options.apply == "timm":
            # only a trained adapter has classes to compare on, and outputs that mean something
            return trained_model(self.bundle, checkpoint=checkpoint, near=near)
        return from_bundle(self.bundle, base_of(self.bundle, checkpoint=checkpoint, near=near))

    def _open(self, source: str, on_progress: Progress | None) -> Images:
        return open_judged(
            source,
            self.bundle.classes,
            skip_bad=self.options.skip_bad,
            workers=self.workers,
            on_progress=on_progress,
            tell=self.tell,
        )

    def _first_pictures(self, judged: Images) -> torch.Tensor:
        # spread over the classes, by which most sources are sorted
        indices = range(0, len(judged), max(1, len(judged) // _SHOWN_IMAGES))
        few = judged.select(list(itertools.islice(indices, _SHOWN_IMAGES)))
        return next(iter(PictureBatches(images=few, preprocessing=self.bundle.preprocessing)))[0]

    def _merge(
        self, adapted: AdaptedModel, judged: Images | None, shown: torch.Tensor | None, on_progress: Progress | None
    ) -> tuple[AdaptedModel, MergeReport, Images | None]:
        """Fold exactly, and where something is left, by fitting; the pictures are those that nothing was fitted on."""
        options = self.options
        settings: dict[str, Any] = {
            "images": shown,
            "as_deltas": options.apply == "adapter",
            "dense": options.dense,
        }
        self.tell(f"folding {len(self.bundle.plan.insertions)} adapters exactly where that is possible")
        merged, report = merge(adapted, **settings)
        if judged is None or not options.fit or not merged.plan.insertions:
            return merged, report, judged
        chosen = choose_fitted(
            judged,
            options.fit_data,
            count=options.fit_images,
            seed=options.seed,
            skip_bad=options.skip_bad,
            workers=self.workers,
            on_progress=on_progress,
        )
        self.tell(chosen.note)
        self.fitted_on = {
            "images": len(chosen.fitted),
            "judged_images": len(chosen.judged),
            "of_data": options.fit_data is None,
            "seed": options.seed,
            "finetune_epochs": options.finetune_epochs,
        }
        batches, held = (
            PictureBatches(images=images, preprocessing=self.bundle.preprocessing, workers=self.workers)
            for images in (chosen.fitted, chosen.judged)
        )
        fit = Fit(
            batches=batches,
            judged=held,
            tolerance=options.tolerance or DEFAULT_TOLERANCE,
            finetune_epochs=options.finetune_epochs,
            on_progress=self.tell,
        )
        merged, report = merge(adapted, **settings, fit=fit)
        return merged, report, chosen.judged

    def _deliver(
        self,
        adapted: AdaptedModel,
        merged: AdaptedModel,
        report: MergeReport,
        checkpoint: Path | None,
        near: Path | None,
    ) -> tuple[AdaptedModel, bytes | None]:
        """The model that the file gives, and the file; without one, the merged model itself."""
        options = self.options
        if options.apply == "timm":
            data = checkpoint_bytes(merged, dtype=options.torch_dtype)
            if not report.timm_loadable:
                self.tell(f"cadapt.merging.load_merged reads the checkpoint, timm does not: {report.timm_reason}")
            return merged, data
        if options.apply is None:
            return merged, None
        bundle = to_bundle(to_deltas(adapted, merged))
        note = f"{bundle.training['merged']}; {report.summary}"
        data = ship_adapter(replace(bundle, training={**bundle.training, "merged": note}), options.dtype).data
        # read back: what is judged is the file
        written = load_bundle(data)
        return from_bundle(written, base_of(written, checkpoint=checkpoint, near=near)), data

    def _ask_timm(self, report: MergeReport, delivered: AdaptedModel) -> MergeReport:
        """Whether the delivered file becomes timm's architecture, where a merge to differences by itself is not."""
        if self.options.apply != "adapter" or report.timm_loadable or delivered.plan.insertions:
            return report
        # the difference that is a new bias may go into a batch norm when it is taken up
        _, again = merge(delivered)
        return replace(report, timm_loadable=again.timm_loadable, timm_reason=again.timm_reason)

    def _size(self, adapted: AdaptedModel, merged: AdaptedModel) -> int:
        """The bytes of the file that ``--apply`` would write, were every merge one of differences."""
        bundle, dtype = as_bundle(adapted, merged), self.options.torch_dtype
        tensors = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in bundle.tensors.items()
        }
        return len(bundle_bytes(replace(bundle, tensors=tensors)))

    def _in_dtype(
        self, report: MergeReport, adapted: AdaptedModel, delivered: AdaptedModel, shown: torch.Tensor | None
    ) -> MergeReport:
        """The report with the comparison of the models in the dtype asked for."""
        dtype = self.options.torch_dtype
        if dtype == torch.float32:
            return report
        one, other = (copy.deepcopy(model).to(dtype).eval() for model in (adapted, delivered))
        found = compare_logits(one, other, make_batch(adapted, shown).to(dtype))
        end_to_end = replace(report.end_to_end, max_abs_error=found.error, agreement=found.agreement)
        return replace(report, dtype=str(dtype).removeprefix("torch."), end_to_end=end_to_end)

    def _judge(
        self, report: MergeReport, adapted: AdaptedModel, delivered: AdaptedModel, judged: Images
    ) -> tuple[MergeReport, str | None]:
        """The report with the figures on the judged pictures, and how the tolerance is missed, or None."""
        options = self.options
        self.tell(f"comparing both models in {options.dtype} on {len(judged)} pictures")
        batches = PictureBatches(
            images=judged,
            preprocessing=self.bundle.preprocessing,
            batch_size=options.batch_size,
            workers=self.workers,
        )
        found = compare_on_data(adapted, delivered, batches, dtype=options.torch_dtype, device=self.device)
        report = replace(report, on_data=found)
        tolerance = options.tolerance or (DEFAULT_TOLERANCE if self.fitted_on else None)
        if tolerance is None:
            return report, None
        met = is_within(tolerance, found)
        report = replace(report, tolerance=str(tolerance), tolerance_met=met)
        return report, None if met else describe_miss(tolerance, found)

    def _time(self, report: MergeReport, adapted: AdaptedModel, merged: AdaptedModel) -> MergeReport:
        options = self.options
        if options.latency is False or (options.latency is None and options.data is None):
            return report
        try:
            found = compare_models(
                forms_of(adapted, merged),
                preprocessing=self.bundle.preprocessing,
                classes=self.bundle.classes or _numbered(adapted),
                on_progress=self.tell,
            )
        except CadaptError as error:
            if options.latency:
                raise
            # nobody asked for it: the rest of the report stands by itself
            self.tell(f"latency is not measured: {error.message}")
            return report
        ratio = next(item.ratio for item in found.models if item.name == "merged")
        frontier = tuple(replace(item, latency=ratio) if item.chosen else item for item in report.frontier)
        return replace(report, latency=found, frontier=frontier)


def _short(found: OnData | None) -> dict[str, Any] | None:
    """What the JSON said of the data before there was ``on_data``."""
    if found is None:
        return None
    return {"images": found.images, "top1_before": found.top1_before, "top1_after": found.top1_after}


def _numbered(model: AdaptedModel) -> tuple[str, ...]:
    """Names of outputs that have none yet."""
    head = model.plan.head
    return tuple(map(str, range(0 if head is None else head.num_classes)))
