"""Running a model without data: on fake tensors of the run's own device type, which compute shapes and nothing else.

Fake tensors, unlike those on the meta device, go the ways that their device goes: autocast casts them, and attention and
dropout take the kernels that a CPU or a GPU would take. So what they keep for backward is what a real run keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cadapt.errors import CadaptError, UsageError
from cadapt.meta import twin_copy


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """A model's twin of fake tensors, in train mode, and the mode in which they live."""

    model: nn.Module
    device: torch.device
    world: FakeTensorMode

    def images(self, shape: Sequence[int], *, channels_last: bool = False) -> Tensor:
        """Return a batch [B, C, H, W] in the dtype of the model's weights, on the twin's device."""
        floating = (parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point())
        dtype = next(floating, torch.get_default_dtype())
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return torch.empty(tuple(shape), dtype=dtype, device=self.device, memory_format=layout)

    def own_storages(self) -> set[int]:
        """Return the identities of the storages that are the model's own."""
        return {identity_of(tensor) for tensor in (*self.model.parameters(), *self.model.buffers())}


def rehearse(model: nn.Module, device: torch.device) -> Rehearsal:
    """Return a rehearsal of a model on a type of device; the model itself, which may be on meta, is left as it was."""
    world = FakeTensorMode()

    def make(tensor: Tensor) -> Tensor:
        with world:
            return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)

    return Rehearsal(model=twin_copy(model, make).train(), device=device, world=world)


def identity_of(tensor: Tensor) -> int:
    """Return what tells a tensor's storage from others while it lives: data pointers are all 0 here."""
    return int(tensor.untyped_storage()._cdata)


def check_shape(input_size: Sequence[int], batch: int) -> tuple[int, int, int]:
    """Return an input size of three extents.

    Raises:
        UsageError: it or the batch makes no sense.
    """
    if batch < 1:
        raise UsageError(f"batch is {batch}, expected 1 or more")
    if len(input_size) != 3 or min(input_size) < 1:
        raise UsageError(f"input size is {tuple(input_size)}, expected channels, height and width, as (3, 224, 224)")
    channels, height, width = input_size
    return channels, height, width


class _RunningOperator(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the operator that runs, for the message when it fails."""

    name: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.name = str(func.name())
        result = func(*args, **(kwargs or {}))
        self.name = None
        return result


@contextmanager
def explaining(model: nn.Module, shape: Sequence[int]) -> Iterator[None]:
    """Run a model without data so that it leaves no trace outside and a failure names its operator.

    Raises:
        CadaptError: anything in it fails.
    """
    operator = _RunningOperator()  # type: ignore[no-untyped-call]
    try:
        # python code of a model may draw random numbers, which must not shift those of the training around us
        with torch.random.fork_rng(devices=[]), operator:
            yield
    except Exception as error:
        where = f" at {operator.name}" if operator.name else ""
        line = next(iter(str(error).splitlines()), type(error).__name__)
        size = "×".join(str(extent) for extent in shape)
        raise CadaptError(
            f"cannot count {type(model).__name__} for an input of {size}: it fails{where}: {line}",
            hint="counting runs the model on shapes without values: check the input size, and what reads values",
        ) from error
