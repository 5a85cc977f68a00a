"""Any timm model with random weights, made in the time it takes to copy them, in which every part matters.

timm's own initialisation takes many seconds for a large model and leaves much at zero: last norms, layer scales,
biases. What stands behind those would get no gradient and prove nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import timm
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cadapt.seeding import seeded

# a prime, so that the rows of no matrix repeat
_POOL = 1_048_573
_LARGE = 20_000


def make_lively(name: str, settings: Mapping[str, Any], *, seed: int = 0) -> nn.Module:
    """A timm model in eval mode with lively weights, the same each time; batch norms are not :func:`calibrated`."""
    with seeded(seed):
        with _NoRandomFill():
            model: nn.Module = timm.create_model(name, **settings)
        enliven(model, seed)
    return model.eval()


class _NoRandomFill(TorchFunctionMode):
    """Leaves out the random initialisation of large parameters; buffers and small tensors get theirs."""

    _SKIPPED = frozenset({"normal_", "uniform_", "erfinv_", "mul_", "add_", "div_", "clamp_", "trunc_normal_"})

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") in self._SKIPPED:
            target = args[0] if args else (kwargs or {}).get("tensor")
            if isinstance(target, nn.Parameter) and target.numel() > _LARGE:
                return target
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def enliven(model: nn.Module, seed: int = 0) -> None:
    """Fill all parameters: matrices and kernels by fan-in, norms around one, biases and scales away from zero."""
    noise = _Noise(seed)
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                _fill(module, name, parameter, noise)


class _Noise:
    """Normal noise of any length from one pool, at an offset that moves on."""

    def __init__(self, seed: int) -> None:
        self._pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(seed))
        self._offset = 0

    def into(self, tensor: torch.Tensor, scale: float, shift: float = 0.0) -> None:
        """Overwrite a tensor with shift + scale · noise."""
        flat = torch.empty(tensor.numel())
        done = 0
        while done < flat.numel():
            part = self._pool[self._offset : self._offset + flat.numel() - done]
            flat[done : done + part.numel()] = part
            done += part.numel()
            self._offset = (self._offset + part.numel()) % _POOL
        tensor.copy_(flat.mul_(scale).add_(shift).reshape(tensor.shape))


def _fill(module: nn.Module, name: str, parameter: nn.Parameter, noise: _Noise) -> None:
    fan_in = _fan_in(module, name, parameter)
    if fan_in is not None:
        noise.into(parameter, _GAIN / fan_in**0.5)
    elif "norm" in type(module).__name__.lower() and name == "weight":
        noise.into(parameter, 0.1, 1.0)
    elif parameter.numel() > _LARGE or "bias" in name:
        # the first values of large ones, position embeddings for example, were left out
        noise.into(parameter, 0.1)
    elif float(parameter.abs().max()) < 0.2:
        # layer scales and gains that start at or near zero
        noise.into(parameter, 0.1, 0.5)
    else:
        first = parameter.clone()
        noise.into(parameter, 0.05)
        parameter.add_(first)


_GAIN = 1.3  # between a linear net's 1 and a rectified one's 1.41


def _fan_in(module: nn.Module, name: str, parameter: nn.Parameter) -> int | None:
    """How many inputs each output sums over; None for what is no matrix."""
    kernel = getattr(module, "kernel_size", None)
    if kernel is not None and name == "weight" and isinstance(getattr(module, "in_channels", None), int):
        sides = kernel if isinstance(kernel, tuple | list) else (kernel, kernel)
        return max(1, module.in_channels // int(getattr(module, "groups", 1)) * int(torch.tensor(sides).prod()))
    if parameter.ndim >= 2 and "weight" in name and min(parameter.shape[0], parameter[0].numel()) > 1:
        return parameter[0].numel()
    return None


@torch.no_grad()
def calibrate(model: nn.Module, images: torch.Tensor) -> None:
    """Give batch norms the statistics of these images, as training would have: activations then neither grow nor die.

    A norm over positions that are alike must not blow up what differs, hence the mean variance on top.
    """
    norms = [item for item in model.modules() if isinstance(item, nn.modules.batchnorm._BatchNorm)]
    handles = [norm.register_forward_pre_hook(_take_statistics) for norm in norms if norm.running_mean is not None]
    if handles:
        model(images)
    for handle in handles:
        handle.remove()


def _take_statistics(norm: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
    x = given[0]
    variance, mean = torch.var_mean(x, dim=[axis for axis in range(x.ndim) if axis != 1], correction=0)
    assert isinstance(norm.running_mean, torch.Tensor) and isinstance(norm.running_var, torch.Tensor)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance + variance.mean() + 1e-3)
