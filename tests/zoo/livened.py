"""Random weights under which everything in a network matters: none vanish, none explode, no gain is zero."""

from __future__ import annotations

import functools

import timm
import torch
from torch import nn
from torch.nn import functional

from tests.models import randomise
from tests.zoo.architectures import ARCHITECTURES


def make_base(name: str) -> nn.Module:
    """A timm model in eval mode with random weights, gains and statistics, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = randomise(timm.create_model(name)).eval()
    _calibrate(model, make_images(name, 8, seed=7))
    return model


@functools.lru_cache(maxsize=1)
def cached_base(name: str) -> nn.Module:
    """The same, built once while one model's tests run: read only."""
    return make_base(name)


def make_images(name: str, batch: int, seed: int = 0) -> torch.Tensor:
    """Pictures' stand-ins ``[B, 3, side, side]``: smooth colours, a little noise, and contrast that differs."""
    side, generator = ARCHITECTURES[name].side, torch.Generator().manual_seed(seed)
    coarse = 2 * torch.randn(batch, 3, 7, 7, generator=generator)
    smooth = functional.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=False)
    contrast = torch.rand(batch, 1, 1, 1, generator=generator)
    return smooth * contrast + (1 - contrast) * torch.randn(batch, 3, side, side, generator=generator)


@torch.no_grad()
def _calibrate(model: nn.Module, images: torch.Tensor) -> None:
    """Give batch norms the statistics of pictures, as training would have.

    Those of plain noise would not do: on smooth pictures activations then grow from layer to layer, until two right
    programs differ by more than any tolerance.
    """
    handles = [
        module.register_forward_pre_hook(_take_statistics)
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    model(images)
    for handle in handles:
        handle.remove()


def _take_statistics(norm: nn.Module, given: tuple[torch.Tensor]) -> None:
    variance, mean = torch.var_mean(given[0], dim=(0, 2, 3))
    assert isinstance(norm.running_mean, torch.Tensor)
    assert isinstance(norm.running_var, torch.Tensor)
    norm.running_mean.copy_(mean)
    # channels that hardly vary on these pictures must not be blown up on others
    norm.running_var.copy_(variance + variance.mean())


@torch.no_grad()
def wake(adapters: nn.Module, seed: int = 1) -> None:
    """Give convs and scales of adapters values as after a long training: each adapter moves its output by a tenth."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapters.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.startswith("head."):
            continue
        if name.endswith("alpha"):
            parameter.copy_(0.5 + 0.1 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.05 * noise)
        else:
            gain = 1.0 if "depthwise" in name else 0.3
            parameter.copy_(gain * noise / parameter[0].numel() ** 0.5)
