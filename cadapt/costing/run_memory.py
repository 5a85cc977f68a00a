"""How much memory a run will take on its device, foretold before it starts, and which batch fits where this does not.

Weights, optimizer and moving average are sums over tensors; the step is rehearsed at the very batch size. What no count
sees comes on top: what kernels use within themselves, the pieces an allocator cannot use, the readers of pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil, inf
from typing import Any

import torch
from torch import Tensor, nn

from cadapt.costing.host import available_memory
from cadapt.costing.step import measure_step

# of the free memory, what a run can be expected to have the use of; the rest is fragments and kernels' own, which are
# more on a CPU, whose convolutions copy what they read (tests/benchmarks/forecast.py measures it)
_USABLE_ON_CPU, _USABLE = 0.8, 0.9
_MOMENTS = 2  # AdamW keeps two numbers for each that trains


@dataclass(frozen=True, kw_only=True)
class StepSetting:
    """What the memory of a step depends on beside the model.

    ``input_size`` are channels, height and width of one image, in pixels. ``batch_size`` images go through the model
    at once, and ``accumulate`` batches make an optimizer step. ``device`` and ``precision`` (fp32, bf16 or fp16) are
    resolved ones. ``average`` says whether a moving average of what trains is kept.
    """

    input_size: tuple[int, int, int]
    batch_size: int
    accumulate: int = 1
    device: str = "cpu"
    precision: str = "fp32"
    channels_last: bool = True
    average: bool = False


@dataclass(frozen=True, kw_only=True)
class MemoryForecast:
    """Bytes that training takes on its device.

    ``weights_bytes`` are all tensors of the model; ``optimizer_bytes`` AdamW's moments; ``average_bytes`` the moving
    average; ``step_bytes`` the most that is alive at once of what a step makes. Of that, ``activation_bytes`` are kept
    between forward and backward, and ``gradient_bytes`` at its end. ``resident_bytes`` are there already, weights that
    lie on the device; ``free_bytes`` is what the device has free now, or None where it does not tell.
    """

    batch_size: int
    accumulate: int
    device: str
    precision: str
    weights_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    average_bytes: int
    activation_bytes: int
    step_bytes: int
    resident_bytes: int
    free_bytes: int | None

    @property
    def total_bytes(self) -> int:
        """All that the run takes at its highest."""
        return self.weights_bytes + self.optimizer_bytes + self.average_bytes + self.step_bytes

    @property
    def usable_bytes(self) -> float:
        """What of the free memory a run can be expected to have the use of; infinite where that is unknown."""
        share = _USABLE_ON_CPU if torch.device(self.device).type == "cpu" else _USABLE
        return inf if self.free_bytes is None else share * self.free_bytes

    @property
    def fits(self) -> bool | None:
        """Whether it fits in what is free, with some to spare; None where that is unknown."""
        if self.free_bytes is None:
            return None
        return self.total_bytes - self.resident_bytes <= self.usable_bytes

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {**asdict(self), "total_bytes": self.total_bytes, "fits": self.fits}


def forecast(model: nn.Module, setting: StepSetting, *, beside: Sequence[nn.Module] = ()) -> MemoryForecast:
    """Foretell the memory of training a model, without running it.

    Args:
        model: what is to be run; it may be on any device, meta included, and need not be in train mode.
        setting: how it is to be run.
        beside: models that stay in the device's memory too, which may share tensors with it: the one that the engine
            made ``model`` of.

    Raises:
        UsageError: the setting makes no sense.
        CadaptError: the step fails, or needs values where there are only shapes; it names the operator.

    >>> setting = StepSetting(input_size=(3, 4, 4), batch_size=2)
    >>> forecast(nn.Sequential(nn.Flatten(), nn.Linear(48, 2, bias=False)), setting).optimizer_bytes
    768
    """
    device = torch.device(setting.device)
    step = measure_step(
        model, setting.input_size, batch=setting.batch_size, device=device, precision=setting.precision,
        channels_last=setting.channels_last, accumulate=setting.accumulate,
    )  # fmt: skip
    tensors = _distinct([model, *beside])
    trained = sum(item.numel() * item.element_size() for item in model.parameters() if item.requires_grad)
    return MemoryForecast(
        batch_size=setting.batch_size,
        accumulate=setting.accumulate,
        device=setting.device,
        precision=setting.precision,
        weights_bytes=sum(map(_bytes_of, tensors)),
        gradient_bytes=step.gradients,
        optimizer_bytes=_MOMENTS * trained,
        average_bytes=trained if setting.average else 0,
        activation_bytes=step.activations,
        step_bytes=max(step.highest, 2 * step.gradients),  # the optimizer works on a copy of the gradients' size
        resident_bytes=sum(_bytes_of(item) for item in tensors if item.device.type == device.type),
        free_bytes=free_memory(device),
    )


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that this process may still take on a device, or None where it does not tell."""
    if device.type == "cuda" and torch.cuda.is_available():
        # torch's allocator holds on to what it was given, for its own later use
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    if device.type == "mps" and torch.backends.mps.is_available():
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return available_memory() if device.type == "cpu" else None


def _bytes_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _distinct(models: Sequence[nn.Module]) -> list[Tensor]:
    """One tensor of each storage."""
    found = {tensor.untyped_storage()._cdata: tensor for model in models
             for tensor in (*model.parameters(), *model.buffers())}  # fmt: skip
    return list(found.values())


def fitting_batch(
    model: nn.Module, setting: StepSetting, first: MemoryForecast, *, beside: Sequence[nn.Module] = ()
) -> MemoryForecast | None:
    """Return the forecast of an optimizer step in more and smaller batches, as few as fit; None where none does.

    Together they are at least the images that the setting asks for, so that training stays what it was but for batch
    statistics. A step's bytes are taken to be affine in the batch to guess, and what is guessed is then counted. Other
    arguments and errors are those of :func:`forecast`, which gave ``first``.
    """
    wanted = setting.batch_size * setting.accumulate
    parts, known = setting.accumulate, first
    while known.fits is False and known.batch_size > 1:
        half = forecast(model, replace(setting, batch_size=known.batch_size // 2, accumulate=2), beside=beside)
        parts = max(parts + 1, ceil(wanted / _estimate(known, half)))
        known = forecast(model, replace(setting, batch_size=ceil(wanted / parts), accumulate=parts), beside=beside)
    return None if known.fits is False else known


def _estimate(known: MemoryForecast, half: MemoryForecast) -> int:
    """The batch that would fit if a step's bytes were affine in the batch, and fewer than one that does not fit."""
    each = (known.step_bytes - half.step_bytes) / (known.batch_size - half.batch_size)
    rest = half.total_bytes - half.resident_bytes - each * half.batch_size
    # where the batch makes no difference, one picture settles whether any fits
    return max(1, min(known.batch_size - 1, int((known.usable_bytes - rest) / each))) if each > 0 else 1
