"""All architectures that match a glob, a row each: size, sites, and what some schemes would add.

Weights are never built, and one that cannot be surveyed is a row with its reason. Many are shared out among
processes, since each takes about half a second and they have nothing in common.
"""

from __future__ import annotations

import functools
import textwrap
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import timm
import torch

from cadapt.backbone import Backbone, load_backbone
from cadapt.describe.garbage import collecting_later
from cadapt.describe.schemes import USUAL_SCHEMES, count_trained, explain_misfits
from cadapt.describe.workers import Died, share_out, usable_cores
from cadapt.errors import CadaptError, UsageError, close_matches
from cadapt.planning import Survey, plan_insertions, survey

SCHEMA = 1
# the two ends add no column to a comparison of architectures: they add the same to all
USUAL_COLUMNS = tuple(name for name in USUAL_SCHEMES if name not in ("linear", "full"))
# a process of its own has imported torch and timm by the time that another has surveyed so many
_WORTH_A_PROCESS = 8
_MOST_PROCESSES = 16
_LONGEST_REASON = 300


@dataclass(frozen=True, kw_only=True)
class SchemeRow:
    """A scheme under its defaults, head left out: its adapters, or why it does not fit.

    ``parameters`` train; ``share`` is theirs of the backbone's. ``tensors`` counts those of the base that are trained
    or get a learned difference.
    """

    name: str
    sites: int
    parameters: int
    share: float
    reason: str | None
    tensors: int = 0


@dataclass(frozen=True, kw_only=True)
class ArchitectureRow:
    """An architecture: ``error`` says why it could not be surveyed, and then all that was to be found out is empty.

    ``weights`` are the tags of its pretrained weights; ``site_counts`` counts its sites by kind.
    """

    name: str
    input_size: tuple[int, ...] | None
    weights: tuple[str, ...] = ()
    parameters: int | None = None
    site_counts: Mapping[str, int]
    schemes: tuple[SchemeRow, ...] = ()
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a glob matched, in the natural order of the names; ``schemes`` are those asked for."""

    glob: str
    schemes: tuple[str, ...]
    models: tuple[ArchitectureRow, ...]

    @property
    def failed(self) -> int:
        """How many could not be surveyed."""
        return sum(row.error is not None for row in self.models)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {"schema": SCHEMA, "kind": "listing", **asdict(self), "failed": self.failed}


def list_architectures(
    glob: str,
    img_size: int | None = None,
    schemes: Sequence[str] = USUAL_COLUMNS,
    *,
    processes: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Listing:
    """Survey every timm architecture that matches a glob.

    Args:
        glob: as the shell's, over the names without tags.
        img_size: input size in pixels, in place of each model's own.
        schemes: names of schemes, or of several joined by ``+``.
        processes: how many do the work; 1 starts none. By default as many as the cores and the number of models merit.
        progress: called with how many are done, and of how many.

    Raises:
        UsageError: none matches.
    """
    names = timm.list_models(glob)
    if not names:
        families = {f"{name.partition('_')[0]}*" for name in timm.list_models()}
        raise UsageError(f"no model matches '{glob}'", hint=close_matches(glob, families))
    work = functools.partial(survey_architecture, img_size=img_size, schemes=tuple(schemes))
    rows = _survey_all(work, names, processes or _merited(len(names)), progress)
    tags = _weight_tags()
    return Listing(
        glob=glob,
        schemes=tuple(schemes),
        models=tuple(replace(rows[name], weights=tags[name]) for name in names),
    )


def _merited(count: int) -> int:
    return max(1, min(usable_cores(), -(-count // _WORTH_A_PROCESS), _MOST_PROCESSES))


def _survey_all(
    work: Callable[[str], ArchitectureRow], names: list[str], processes: int, progress: Callable[[int, int], None]
) -> dict[str, ArchitectureRow]:
    rows: dict[str, ArchitectureRow] = {}

    def done(name: str, row: ArchitectureRow | Died) -> None:
        rows[name] = _failed(name, _last_words(row)) if isinstance(row, Died) else row
        progress(len(rows), len(names))

    progress(0, len(names))
    if processes > 1:
        share_out(work, names, processes, done)
    else:
        for name in names:
            done(name, work(name))
    return rows


def survey_architecture(
    name: str, img_size: int | None = None, schemes: Sequence[str] = USUAL_COLUMNS
) -> ArchitectureRow:
    """Survey one architecture without its weights; whatever goes wrong is the row's ``error``."""
    try:
        # what a model's code has to say to its author is no news to whoever lists it
        with collecting_later(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.device("meta"):
                backbone = load_backbone(name, pretrained=False, img_size=img_size)
            surveyed = survey(backbone)
            return _row(name, backbone, surveyed, schemes)
    except Exception as error:  # code of a thousand models: one that fails must not stop the listing
        return _failed(name, _one_line(error))


def _row(name: str, backbone: Backbone, surveyed: Survey, schemes: Sequence[str]) -> ArchitectureRow:
    reasons = explain_misfits(surveyed, schemes)
    return ArchitectureRow(
        name=name,
        input_size=backbone.preprocessing.input_size,
        parameters=sum(item.numel() for item in backbone.model.parameters()),
        site_counts=dict(Counter(site.kind for site in surveyed.sites)),
        schemes=tuple(_scheme_row(backbone, surveyed, scheme, reasons[scheme]) for scheme in schemes),
    )


def _scheme_row(backbone: Backbone, surveyed: Survey, scheme: str, reason: str | None) -> SchemeRow:
    if reason is None:
        try:
            plan = plan_insertions(backbone, scheme, surveyed=surveyed)
        except CadaptError as error:
            reason = error.message
    if reason is not None:
        return SchemeRow(name=scheme, sites=0, parameters=0, share=0.0, reason=reason)
    trained = count_trained(backbone, surveyed, plan)
    share = trained / max(1, backbone.base.parameters)
    tensors = len(plan.trainable) + len(plan.deltas)
    return SchemeRow(
        name=scheme, sites=len(plan.insertions), parameters=trained, share=share, reason=None, tensors=tensors
    )


def _failed(name: str, reason: str) -> ArchitectureRow:
    config = timm.get_pretrained_cfg(name)
    return ArchitectureRow(name=name, input_size=config.input_size if config else None, site_counts={}, error=reason)


def _one_line(error: Exception) -> str:
    if isinstance(error, CadaptError):
        return textwrap.shorten(error.message, _LONGEST_REASON, placeholder=" …")
    text = textwrap.shorten(str(error), _LONGEST_REASON, placeholder=" …")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _last_words(end: Died) -> str:
    if end.exit_code is None:
        return "the processes that survey were killed before it"
    if end.exit_code < 0:
        return f"its process was killed by signal {-end.exit_code}: too little memory, perhaps"
    return f"its process ended with code {end.exit_code}"


def _weight_tags() -> Mapping[str, tuple[str, ...]]:
    found: defaultdict[str, tuple[str, ...]] = defaultdict(tuple)
    for item in timm.list_pretrained():
        name, _, tag = item.partition(".")
        found[name] += (tag,)
    return found
