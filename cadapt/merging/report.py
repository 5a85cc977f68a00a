"""What a merge found: one row per adapter and the comparison of the two models, as frozen values with JSON.

The commands and the report layer show these and compute nothing of their own. Imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from cadapt.plan import Form
from cadapt.site import SiteKind

SCHEMA = 1

Status = Literal["exact", "simplified", "kept", "refused"]


@dataclass(frozen=True, kw_only=True)
class SiteMerge:
    """What became of one adapter.

    ``status`` is ``exact`` (folded into the base's layer: the adapter is gone), ``simplified`` (it stays, in a cheaper
    form that computes the same), ``kept`` (it stays as it was) or ``refused`` (a merge was computed, failed its check
    and was not delivered: the adapter stays as it was). ``reason`` is a sentence, empty for ``exact`` alone; ``note``
    says what else changed for the merge.

    ``error_fp64`` and ``error_fp32`` are the largest difference over the largest value, on random input, between the
    layer with its adapter and the merged layer (for ``simplified``: between the adapter's two forms), all computed in
    that precision. ``effect`` is ‖Δ‖/‖h‖ on that input, which the errors are to be judged against;
    ``relative_update`` is ‖ΔW‖/‖W‖. None where the figure does not apply. ``parameters`` and ``macs`` (of one image)
    are what the adapter adds to the base, before and after.
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

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object; figures that are no finite numbers are null."""
        return _finite(asdict(self))


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

    ``parameters`` and ``macs`` (of one image) are the models', before and after. ``verified`` says that every delivered
    change and the model as a whole passed their checks in fp64. ``differences`` is how many of the base's own tensors
    took a learned difference up. ``timm_loadable`` says whether the merged model is the timm architecture again,
    ``timm_reason`` why it is not. ``summary`` is one sentence.
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

    @property
    def merged(self) -> int:
        """How many adapters folded into the base."""
        return self.count("exact")

    @property
    def total(self) -> int:
        """How many adapters there were."""
        return len(self.sites)

    def count(self, status: Status) -> int:
        """How many adapters have a status."""
        return sum(row.status == status for row in self.sites)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object, versioned by ``schema``; fields are only ever added."""
        values = _finite({key: value for key, value in asdict(self).items() if key not in ("sites", "end_to_end")})
        return {
            "schema": SCHEMA,
            **values,
            "merged": self.merged,
            "total": self.total,
            "end_to_end": _finite(asdict(self.end_to_end)),
            "sites": [row.to_json() for row in self.sites],
        }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }
