"""The adapted and the merged model as wholes, on the same pictures: what the end of a merge is judged by."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from cadapt.adapted import AdaptedModel
from cadapt.merging.differences import without_deltas
from cadapt.surgery import adapter_path

_IMAGES = 4


@dataclass(frozen=True, kw_only=True)
class Logits:
    """The largest difference of a logit, the largest logit, and the share of equal predictions."""

    error: float
    scale: float
    agreement: float


def make_batch(adapted: AdaptedModel, images: torch.Tensor | None) -> torch.Tensor:
    """The given pictures, or random ones of the model's size, in fp64 on the CPU."""
    if images is not None:
        return images.detach().cpu().double()
    generator = torch.Generator().manual_seed(0)
    return torch.randn((_IMAGES, *adapted.preprocessing.input_size), generator=generator, dtype=torch.float64)


@torch.no_grad()
def compare_logits(adapted: nn.Module, merged: nn.Module, batch: torch.Tensor) -> Logits:
    """Compare two models on a batch ``[B, C, H, W]`` of their dtype."""
    wanted, got = adapted(batch).double(), merged(batch).double()
    return Logits(
        error=float((wanted - got).abs().max()),
        scale=float(wanted.abs().max()),
        agreement=float((wanted.argmax(dim=1) == got.argmax(dim=1)).double().mean()),
    )


@torch.no_grad()
def effect_on_logits(adapted: AdaptedModel, batch: torch.Tensor) -> float:
    """The largest change of a logit that all adapters and differences make together; the task's head stays on."""
    paths = [adapter_path(insertion) for insertion in adapted.plan.insertions]
    trained = adapted(batch)
    with ExitStack() as stack:
        stack.enter_context(without_deltas(adapted))
        for path in paths:
            handle = adapted.get_submodule(path).register_forward_hook(_silence)
            stack.callback(handle.remove)
        untrained = adapted(batch)
    return float((trained - untrained).abs().max())


def _silence(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(output)
