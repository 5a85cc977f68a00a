"""Random weights under which everything in a network matters: none vanish, none explode, no gain is zero."""

from __future__ import annotations

import functools

import timm
import torch
from torch import nn

from tests.models import randomise
from tests.zoo.architectures import ARCHITECTURES


def make_base(name: str) -> nn.Module:
    """A timm model in eval mode with random weights, gains and statistics, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = randomise(timm.create_model(name)).eval()
    _calibrate(model, ARCHITECTURES[name].side)
    return model


@functools.lru_cache(maxsize=1)
def cached_base(name: str) -> nn.Module:
    """The same, built once while one model's tests run: read only."""
    return make_base(name)


def make_images(name: str, batch: int, seed: int = 0) -> torch.Tensor:
    """Pictures' stand-ins ``[B, 3, side, side]``: noise of unit variance under colours that differ by picture."""
    side, generator = ARCHITECTURES[name].side, torch.Generator().manual_seed(seed)
    colour = torch.randn(batch, 3, 1, 1, generator=generator)
    return colour + torch.randn(batch, 3, side, side, generator=generator)


@torch.no_grad()
def _calibrate(model: nn.Module, side: int) -> None:
    """Give batch norms the statistics of a batch, as training would have."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    model(torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(7)))
    for norm in norms:
        norm.momentum = 0.1
        norm.eval()


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
