"""What a merge found: one row per adapter and the comparison of the two models, as frozen values with JSON.

The commands and the report layer show these and compute nothing of their own. Imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from cadapt.plan import Form
from cadapt.site import SiteKind

SCHEMA = 1
_NESTED = ("sites", "end_to_end", "frontier", "on_data", "latency")

Status = Literal["exact", "fitted", "simplified", "kept", "dropped", "refused"]
# of an adapter that the merged model still has
STAYING: tuple[Status, ...] = ("simplified", "kept", "refused")


@dataclass(frozen=True, kw_only=True)
class SiteMerge:
    """What became of one adapter.

    ``status`` is ``exact`` (folded into the base's layer: the adapter is gone), ``fitted`` (gone as well: a kernel that
    was fitted to what it does on real pictures is in the base's layers), ``dropped`` (gone, and nothing stands in for
    it), ``simplified`` (it stays, in a cheaper form that computes the same), ``kept`` (it stays as it was) or
    ``refused`` (a merge was computed, failed its check and was not delivered: the adapter stays as it was). ``reason``
    is a sentence, empty for ``exact`` alone; ``note`` says what else changed for the merge.

    ``error_fp64`` and ``error_fp32`` are the largest difference over the largest value, on random input, between the
    layer with its adapter and the merged layer (for ``simplified``: between the adapter's two forms), all computed in
    that precision. ``effect`` is ‖Δ‖/‖h‖ on that input, which the errors are to be judged against;
    ``relative_update`` is ‖ΔW‖/‖W‖. Both are None where the layer's h or W is zero throughout and the change is not;
    a figure that does not apply is None as well. ``parameters`` and ``macs`` (of one image) are what the adapter adds
    to the base, before and after.

    What was measured on real pictures, by a fitted merge: ``linear_share`` is the share of the adapter's activations
    that work in their linear range, ``relative_size`` ‖Δ‖/‖h‖ for what it is added to, ``r2`` the share of ‖Δ‖² (about
    its mean) that the best kernel in the base's layers stands in for, on pictures it was not fitted to, before any
    other adapter was folded; below zero it is worse than nothing. ``hosts`` are the layers that take the kernel up,
    or could where the adapter stays, ``step`` the place of this adapter in the frontier, from 1.
    """

    site: str
    kind: SiteKind
    scheme: str
    form: Form
    status: Status
    reason: str = ""
    note: str = ""
    error_fp64: float | None = None
    error_fp32: float | None = None
    relative_update: float | None = None
    effect: float | None = None
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    linear_share: float | None = None
    relative_size: float | None = None
    r2: float | None = None
    hosts: tuple[str, ...] = ()
    step: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object; figures that are no finite numbers are null."""
        return _finite({**asdict(self), "hosts": list(self.hosts)})


@dataclass(frozen=True, kw_only=True)
class FrontierPoint:
    """The model with the first ``folded`` adapters of the frontier's order gone, measured on the judged pictures.

    ``folded`` 0 is the model of the exact merges alone; ``site`` is the adapter that went last, by ``action``.
    ``top1`` is None where the pictures have no labels; ``agreement`` is the share of predictions equal to those of the
    unmerged model, ``max_logit_error`` the largest and ``logit_error`` the relative RMS difference of a logit to it.
    ``parameters`` (but for biases that a fit adds where no norm takes them, which only the chosen point counts) and
    ``macs`` (of one image) are the whole model's, ``latency`` its onnxruntime time over the
    base's, None where it was not measured. ``refined`` says that it was trained to the unmerged model's logits after
    the folding, ``chosen`` that this is the point the merged model stands at.
    """

    folded: int
    site: str = ""
    action: Literal["", "fitted", "dropped"] = ""
    images: int
    top1: float | None
    agreement: float
    max_logit_error: float
    logit_error: float
    parameters: int
    macs: int
    latency: float | None = None
    refined: bool = False
    chosen: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return _finite(asdict(self))


@dataclass(frozen=True, kw_only=True)
class OnData:
    """The unmerged and the merged model, in the merged one's dtype, on all pictures that were named.

    ``agreement`` is the share of equal predictions, ``max_logit_error`` the largest difference of a logit,
    ``logit_error`` their RMS difference over the RMS of the unmerged model's logits (about their mean).
    """

    images: int
    top1_before: float
    top1_after: float
    agreement: float
    max_logit_error: float
    logit_error: float


@dataclass(frozen=True, kw_only=True)
class ModelLatency:
    """One model's time for a batch in onnxruntime, measured in turns with the others.

    ``milliseconds`` is the median; ``ratio`` the median over the turns of its time to the base's in the same turn, with
    the quartiles ``ratio_low`` and ``ratio_high``.
    """

    name: Literal["base", "adapted", "simplified", "merged"]
    milliseconds: float
    ratio: float
    ratio_low: float
    ratio_high: float
    nodes: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Paired runs of several models: ``turns`` turns, in each of which every model ran once."""

    models: tuple[ModelLatency, ...]
    batch_size: int
    turns: int
    threads: int
    runtime: str


@dataclass(frozen=True, kw_only=True)
class EndToEnd:
    """The adapted and the merged model on the same pictures.

    ``max_abs_error_fp64`` is the largest difference of a logit with both in fp64, ``max_abs_error`` in the merged
    model's dtype. They are to be judged against ``logit_effect``, the largest change of a logit that adapters and
    differences make together (0 where they do not reach the logits, and the comparison so proves nothing), and
    ``logit_scale``, the largest logit. ``agreement`` is the share of equal predictions.
    """

    images: int
    random_images: bool
    max_abs_error_fp64: float
    max_abs_error: float
    logit_scale: float
    logit_effect: float
    agreement: float


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """A whole merge.

    ``parameters`` and ``macs`` (of one image) are the models', before and after. ``verified`` says that every exact or
    simplified change passed its check in fp64, and so did the model before anything was fitted. ``differences``
    is how many of the base's own tensors took a learned difference up. ``timm_loadable`` says whether the merged model
    is the timm architecture again, ``timm_reason`` why it is not. ``summary`` is one sentence.

    ``frontier`` is what a fitted merge measured, point by point. ``tolerance`` is the loss the user allows, as text,
    ``tolerance_met`` whether the merged model is within it (None where none was set). ``on_data``, ``latency`` and the
    bytes of the adapter file, before and after, are None where they were not measured.
    """

    base: str
    scheme: str
    dtype: str
    summary: str
    sites: tuple[SiteMerge, ...]
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    end_to_end: EndToEnd
    verified: bool
    differences: int = 0
    timm_loadable: bool
    timm_reason: str = ""
    frontier: tuple[FrontierPoint, ...] = ()
    tolerance: str = ""
    tolerance_met: bool | None = None
    on_data: OnData | None = None
    latency: Latency | None = None
    bytes_before: int | None = None
    bytes_after: int | None = None

    @property
    def merged(self) -> int:
        """How many adapters folded into the base exactly."""
        return self.count("exact")

    @property
    def gone(self) -> int:
        """How many adapters the merged model does without."""
        return self.total - sum(row.status in STAYING for row in self.sites)

    @property
    def total(self) -> int:
        """How many adapters there were."""
        return len(self.sites)

    def count(self, status: Status) -> int:
        """How many adapters have a status."""
        return sum(row.status == status for row in self.sites)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object, versioned by ``schema``; fields are only ever added."""
        plain = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _NESTED}
        return {
            "schema": SCHEMA,
            **_finite(plain),
            "merged": self.merged,
            "gone": self.gone,
            "total": self.total,
            "end_to_end": _finite(asdict(self.end_to_end)),
            "sites": [row.to_json() for row in self.sites],
            "frontier": [point.to_json() for point in self.frontier],
            "on_data": None if self.on_data is None else _finite(asdict(self.on_data)),
            "latency": None if self.latency is None else asdict(self.latency),
        }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }
