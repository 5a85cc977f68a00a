"""What a fitted merge is asked for, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from cadapt.adapted import AdaptedModel
from cadapt.errors import UsageError
from cadapt.merging.report import FrontierPoint, SiteMerge
from cadapt.tolerance import Tolerance

# pictures [B, C, H, W], normalised, and labels [B]; -1 is a picture without a label
Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How kernels are fitted, and how far the merged model may go.

    Args:
        batches: what the kernels are fitted on: anything that can be gone through several times and gives pictures
            ``[B, C, H, W]``, normalised, with labels ``[B]``; the labels are not looked at.
        judged: what each point of the frontier is measured on, likewise; labels below 0 are of no class.
        tolerance: what the merged model may lose there against the unmerged one.
        finetune_epochs: passes over ``batches`` in which the layers that took kernels up, and the adapters that stay,
            are trained to the unmerged model's logits; 0 is none.
        on_progress: called with a line of what is being done.

    Raises:
        UsageError: the tolerance is none, or batches that can be gone through only once.
    """

    batches: Batches
    judged: Batches
    tolerance: Tolerance
    finetune_epochs: int = 0
    on_progress: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.tolerance, Tolerance):
            raise UsageError(
                f"tolerance is {self.tolerance!r:.40}, expected a Tolerance", hint='cadapt.parse_tolerance("top1=0.5%")'
            )
        for name in ("batches", "judged"):
            value = getattr(self, name)
            if not isinstance(value, Iterable) or isinstance(value, Iterator):
                raise UsageError(
                    f"{name} is a {type(value).__name__}, which cannot be gone through several times",
                    hint="a list of (images, labels), or a DataLoader",
                )


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """The model at the chosen point, in fp64, the rows of all adapters, and every point that was measured."""

    model: AdaptedModel
    rows: tuple[SiteMerge, ...]
    frontier: tuple[FrontierPoint, ...]
