"""Make the private copies that the export works on: the reference to agree with, and the model to convert.

Both are in eval mode on the CPU and wrapped alike, so that normalisation and softmax, where asked for, are part of
what is verified. The caller's model is never touched.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn

from cadapt.errors import CadaptError
from cadapt.export.report import Dtype
from cadapt.graph import standardised
from cadapt.preprocessing import Preprocessing

# a protobuf message ends at 2 GiB; the graph beside the weights needs some of it
_LARGEST_BYTES = 2**31 - 2**24
_ELEMENT_BYTES: dict[Dtype, int] = {"fp32": 4, "fp16": 2}


class Deployable(nn.Module):
    """A model with what surrounds it in use: optional normalisation before it, optional softmax after it.

    Args:
        model: maps ``[batch, channels, height, width]`` to ``[batch, classes]``.
        preprocessing: its channel means and deviations.
        normalize: take pictures in [0, 1] and normalise them inside; else take normalised ones.
        softmax: give probabilities; else logits.
        dtype: what the model computes in. Input and output keep the type of the image.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, model: nn.Module, preprocessing: Preprocessing, *, normalize: bool, softmax: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.model = model.to(dtype)
        self.normalize = normalize
        self.softmax = softmax
        self.dtype = dtype
        outer = torch.float64 if dtype is torch.float64 else torch.float32
        self.register_buffer("mean", torch.tensor(preprocessing.mean, dtype=outer).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std, dtype=outer).view(1, -1, 1, 1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Map ``[batch, channels, height, width]`` to ``[batch, classes]``."""
        if self.normalize:
            image = (image - self.mean) / self.std
        output: torch.Tensor = self.model(image.to(self.dtype)).to(image.dtype)
        return output.softmax(dim=1) if self.softmax else output


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The reference (what the caller's model computes, fp32) and the model to convert, with what was changed in it."""

    reference: Deployable
    model: Deployable
    rewrites: dict[str, int]
    skipped: tuple[str, ...]


def _check_size(model: nn.Module, dtype: Dtype) -> None:
    elements = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    size = elements * _ELEMENT_BYTES[dtype]
    if size > _LARGEST_BYTES:
        raise CadaptError(
            f"the model holds {size / 2**30:.1f} GiB of {dtype} weights; one ONNX file holds at most 2 GiB",
            hint="export it with dtype fp16" if dtype == "fp32" else None,
        )


def _check_output(reference: nn.Module, example: torch.Tensor, classes: int) -> None:
    with torch.no_grad():
        output = reference(example)
    if output.shape != (len(example), classes):
        raise CadaptError(
            f"the model's output is {list(output.shape)} for {len(example)} images and {classes} class names, "
            f"expected [{len(example)}, {classes}]"
        )


def prepare(
    model: nn.Module, preprocessing: Preprocessing, *, classes: int, normalize: bool, softmax: bool, dtype: Dtype
) -> Prepared:
    """Copy the model, wrap it, and bake what is computed from weights alone.

    Raises:
        CadaptError: the weights do not fit in one file, or the output does not match the number of classes.
    """
    _check_size(model, dtype)
    plain = deepcopy(model).cpu().eval()
    for parameter in plain.parameters():
        parameter.requires_grad_(False)
    reference = Deployable(plain, preprocessing, normalize=normalize, softmax=softmax, dtype=torch.float32).eval()
    example = torch.zeros((2, *preprocessing.input_size))
    _check_output(reference, example, classes)
    copy = deepcopy(plain)
    baking = standardised.bake_weights(copy, example)
    inner = torch.float16 if dtype == "fp16" else torch.float32
    converted = Deployable(copy, preprocessing, normalize=normalize, softmax=softmax, dtype=inner).eval()
    rewrites = {standardised.RULE: len(baking.baked)} if baking.baked else {}
    return Prepared(reference=reference, model=converted, rewrites=rewrites, skipped=baking.skipped)
