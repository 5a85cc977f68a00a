"""What a merge is asked for, as the user says it; what contradicts itself is refused before any work is done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from cadapt.errors import UsageError, close_matches
from cadapt.tolerance import Tolerance

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FIT_IMAGES = 512
DEFAULT_TOLERANCE = Tolerance(metric="top1", bound=0.005)


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """How an adapter is merged, what the merge is measured on, and what is made of it.

    Args:
        data: pictures to compare the unmerged and the merged model on; None compares them on random ones.
        fit: fold also what is not linear, by kernels fitted on pictures, where there is ``data``.
        fit_data: pictures to fit on; None takes half of ``data``.
        fit_images: the most pictures to fit on.
        tolerance: what the merged model may lose on ``data``; None is no demand, and fitted merges keep within
            :data:`DEFAULT_TOLERANCE`.
        finetune_epochs: passes of training to the unmerged model's logits, after folding.
        dense: fold even where the sum costs more than layer and adapter.
        dtype: of the merged model and of the file: fp32, bf16 or fp16.
        apply: what to write: an ``adapter`` file of differences, a checkpoint for ``timm``, or nothing (None).
        latency: measure the models in onnxruntime; None does where there is ``data`` and it can be done.
        seed: of the split and of the choice of pictures.
        device: where the models are compared on ``data``.
        workers: processes that read pictures.
        skip_bad: leave out unreadable pictures.
        batch_size: pictures at a time, for the comparison on ``data``.

    Raises:
        UsageError: an option is unknown, out of range, or without another that it needs.
    """

    data: str | None = None
    fit: bool = True
    fit_data: str | None = None
    fit_images: int = FIT_IMAGES
    tolerance: Tolerance | None = None
    finetune_epochs: int = 0
    dense: bool = False
    dtype: str = "fp32"
    apply: Literal["adapter", "timm"] | None = None
    latency: bool | None = None
    seed: int = 0
    device: str = "auto"
    workers: int | None = None
    skip_bad: bool = False
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(f"unknown dtype '{self.dtype}'", hint=close_matches(self.dtype, DTYPES))
        for name, value, least in (
            ("--fit-images", self.fit_images, 1),
            ("--finetune-epochs", self.finetune_epochs, 0),
            ("--seed", self.seed, 0),
            ("--batch-size", self.batch_size, 1),
        ):
            if value < least:
                raise UsageError(f"{name} is {value}, expected {least} or more")
        asked = {
            "--tolerance": self.tolerance is not None,
            "--fit-data": self.fit_data is not None,
            "--finetune-epochs": self.finetune_epochs > 0,
        }
        given = [name for name, is_given in asked.items() if is_given]
        if given and self.data is None:
            raise UsageError(f"{given[0]} needs pictures to judge the merged model on", hint=f"--data DIR {given[0]} …")
        fitting = [name for name in given if name != "--tolerance"]
        if fitting and not self.fit:
            raise UsageError(f"{fitting[0]} and --no-fit contradict each other", hint="leave one of them out")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's."""
        return DTYPES[self.dtype]
