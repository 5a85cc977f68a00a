"""What one training step holds: the bytes that autograd keeps for backward, and the most that is alive at once.

The step is rehearsed (:mod:`cadapt.costing.rehearsal`): a forward pass, a sum, a backward pass. Storages are followed
from the operator that makes them to the moment that nothing needs them, so that what backward frees on its way, and
what it makes meanwhile, is in the figure. What kernels use within themselves is not.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cadapt.costing.rehearsal import Rehearsal, check_shape, explaining, identity_of, rehearse

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class StepBytes:
    """Bytes of one training step, the model's own tensors left out.

    ``activations`` are what autograd keeps between forward and backward, the input where a layer needs it included;
    ``gradients`` those of the parameters. ``highest`` is the most that is alive at once of all that the step makes:
    the batch, activations, gradients and what passes.
    """

    activations: int
    gradients: int
    highest: int


def count_activations(
    model: nn.Module,
    input_size: Sequence[int] = (3, 224, 224),
    *,
    batch: int = 1,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    channels_last: bool = False,
    disposable: bool = False,
) -> int:
    """Count what autograd keeps of one training step, in bytes: distinct storages, but not the model's own tensors.

    Args:
        model: any module that maps images to a tensor or to tensors, on any device, meta included; it is not run.
        input_size: channels, height and width of one image, in pixels.
        batch: images in the step.
        device: the type of device that the step is to run on, which this machine need not have.
        precision: fp32 for none, or ``bf16`` or ``fp16`` autocast.
        channels_last: the memory format of the images.
        disposable: the model may be used up, which saves a copy where it is on meta already.

    Raises:
        UsageError: the input size or the batch makes no sense.
        CadaptError: the forward pass fails, or needs values where there are only shapes; it names the operator.

    >>> count_activations(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (3, 4, 4), batch=2)
    768
    """
    shape = (batch, *check_shape(input_size, batch))
    watch = _Kept()
    with explaining(model, shape):
        rehearsal = rehearse(model, torch.device(device), precision, disposable=disposable)
        with rehearsal.world:
            outputs = _forward(rehearsal, rehearsal.images(shape, channels_last=channels_last), precision, watch)
            kept = watch.total(rehearsal.own_storages())
    del outputs  # held until here: what no output depends on is freed, and rightly not counted
    return kept


def measure_step(
    model: nn.Module,
    input_size: Sequence[int] = (3, 224, 224),
    *,
    batch: int = 1,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    channels_last: bool = False,
    accumulate: int = 1,
) -> StepBytes:
    """Rehearse one training step, forward and backward; arguments and errors as :func:`count_activations` says.

    With ``accumulate`` above 1 the gradients of the batches before are there throughout. A device other than the CPU
    must be one that this machine has: autograd asks its driver.
    """
    shape = (batch, *check_shape(input_size, batch))
    with explaining(model, shape):
        rehearsal = rehearse(model, torch.device(device), precision)
        return _measured(rehearsal, shape, precision, channels_last=channels_last, accumulate=accumulate)


def _measured(
    rehearsal: Rehearsal, shape: tuple[int, ...], precision: str, *, channels_last: bool, accumulate: int
) -> StepBytes:
    trained = [item for item in rehearsal.model.parameters() if item.requires_grad]
    watch, live = _Kept(), _Live()
    with rehearsal.world, live:
        if accumulate > 1:
            for item in trained:
                item.grad = torch.zeros_like(item)
        images = rehearsal.images(shape, channels_last=channels_last)
        outputs = _forward(rehearsal, images, precision, watch)
        del images
        kept = watch.total(rehearsal.own_storages())
        wanted = [item.float().sum() for item in _tensors(outputs) if item.requires_grad]
        del outputs
        if wanted:
            torch.stack(wanted).sum().backward()  # type: ignore[no-untyped-call]
    gradients = sum(item.grad.untyped_storage().nbytes() for item in trained if item.grad is not None)
    return StepBytes(activations=kept, gradients=gradients, highest=live.highest)


def _tensors(outputs: Any) -> list[Tensor]:
    return [item for item in tree_leaves(outputs) if isinstance(item, Tensor)]


def _forward(rehearsal: Rehearsal, images: Tensor, precision: str, watch: _Kept) -> Any:
    hooks = saved_tensors_hooks(watch.keep, watch.give_back)
    with torch.enable_grad(), hooks, _autocast(precision, rehearsal.device):
        return rehearsal.model(images)


def _autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=_AUTOCAST[precision])


class _Packed:
    """Stands for one tensor that autograd keeps; it lives as long as the graph node that keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        # detached, for a node that kept its own output through us would never be freed; but the state of a random
        # generator, which recomputation keeps, is no fake tensor, and no operator takes it here
        self.tensor = tensor.detach() if tensor.requires_grad else tensor


class _Kept:
    """What autograd was given to keep, and has not let go of."""

    def __init__(self) -> None:
        self._references: list[weakref.ref[_Packed]] = []

    def keep(self, tensor: Tensor) -> _Packed:
        packed = _Packed(tensor)
        self._references.append(weakref.ref(packed))
        return packed

    def give_back(self, packed: _Packed) -> Tensor:
        return packed.tensor

    def total(self, left_out: set[int]) -> int:
        alive = [packed.tensor for reference in self._references if (packed := reference()) is not None]
        sizes = {identity_of(tensor): tensor.untyped_storage().nbytes() for tensor in alive}
        return sum(count for identity, count in sizes.items() if identity not in left_out)


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages that operators make, from making to freeing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.highest = 0
        self._now = 0
        self._references: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {identity_of(tensor) for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            # a storage that came in as an argument is another's result, or the model's own
            if identity_of(tensor) not in given:
                self._follow(tensor.untyped_storage())
        self.highest = max(self.highest, self._now)
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        identity, size = int(storage._cdata), storage.nbytes()
        if identity in self._references:
            return

        def freed(_reference: object) -> None:
            del self._references[identity]
            self._now -= size

        self._references[identity] = weakref.ref(storage, freed)
        self._now += size
