"""Putting adapters into a backbone: planned, spliced, written, read back, and compared with the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cadapt.adapted import AdaptedModel
from cadapt.adapters import configure, get_schemes
from cadapt.backbone import Backbone, check_architecture, load_backbone
from cadapt.bundle import bundle_bytes, load_bundle
from cadapt.errors import CadaptError
from cadapt.library import from_bundle, to_bundle
from cadapt.planning import plan_insertions, survey
from cadapt.surgery import operate
from cadapt.verify import InsertionCheck, check_insertion


@dataclass(frozen=True, kw_only=True)
class Insertion:
    """A base with a scheme's adapters in it, not yet written."""

    backbone: Backbone
    model: AdaptedModel

    @property
    def trainable_parameters(self) -> int:
        """What will train, besides the head that training adds."""
        return sum(item.numel() for item in self.model.parameters() if item.requires_grad)

    def write(self) -> tuple[bytes, InsertionCheck]:
        """The adapter file, with the proof that what it holds, read back, leaves the base's outputs as they were.

        Raises:
            CadaptError: it does not, where the scheme starts at zero.
        """
        data = bundle_bytes(to_bundle(self.model))
        check = check_insertion(self.backbone, from_bundle(load_bundle(data), self.backbone))
        starts_at_zero = all(item.config.get("init", "zero") == "zero" for item in self.model.plan.insertions)
        if starts_at_zero and not check.identical_on:
            name, worst = self.backbone.base.name, check.max_error
            raise CadaptError(f"the adapted model differs from {name} by {worst:.3g}, expected no difference at all")
        return data, check


def insert_into(
    architecture: str,
    scheme: str,
    settings: Mapping[str, Any],
    *,
    checkpoint: Path | None = None,
    pretrained: bool = True,
    img_size: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
) -> Insertion:
    """Load a backbone and put a scheme's adapters into it.

    Raises:
        UsageError: a name or a setting is not known, found before any weights are loaded.
        CadaptError: as :func:`cadapt.backbone.load_backbone` and :func:`cadapt.planning.plan_insertions` say.
    """
    configure(get_schemes(scheme), settings)
    check_architecture(architecture)
    backbone = load_backbone(architecture, checkpoint=checkpoint, pretrained=pretrained, seed=seed, img_size=img_size)
    surveyed = survey(backbone)
    plan = plan_insertions(backbone, scheme, settings, include=include, exclude=exclude, seed=seed, surveyed=surveyed)
    return Insertion(backbone=backbone, model=operate(backbone, plan, surveyed))
