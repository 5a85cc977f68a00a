"""Running a model without data: on tensors that have shapes, dtypes and a device, and nothing else.

A CPU in fp32 is played by the meta device, which is the fastest. Anything else is played by fake tensors of the run's
own device type, for they go the ways that their device goes: autocast casts them, and attention and dropout take the
kernels that a GPU would take. So what they keep for backward is what a real run keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cadapt.errors import CadaptError, UsageError
from cadapt.meta import meta_copy, twin_copy


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """A model's twin without data, in train mode, the device its tensors are on, and the mode in which they live."""

    model: nn.Module
    device: torch.device
    world: AbstractContextManager[object]

    def images(self, shape: Sequence[int], *, channels_last: bool = False) -> Tensor:
        """Return a batch [B, C, H, W] in the dtype of the model's weights, on the twin's device."""
        floating = (parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point())
        dtype = next(floating, torch.get_default_dtype())
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return torch.empty(tuple(shape), dtype=dtype, device=self.device, memory_format=layout)

    def own_storages(self) -> set[int]:
        """Return the identities of the storages that are the model's own."""
        return {identity_of(tensor) for tensor in (*self.model.parameters(), *self.model.buffers())}


def rehearse(model: nn.Module, device: torch.device, precision: str = "fp32", *, disposable: bool = False) -> Rehearsal:
    """Return a rehearsal of a model on a type of device; the model, which may be on meta, is left as it was.

    One that is ``disposable`` is used itself where its tensors are on meta and that will do.
    """
    if device.type == "cpu" and precision == "fp32":
        meta = torch.device("meta")
        is_twin = disposable and all(item.is_meta for item in (*model.parameters(), *model.buffers()))
        twin = model if is_twin else meta_copy(model)
        return Rehearsal(model=twin.train(), device=meta, world=_FusedAttention())
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


class _FusedAttention(TorchFunctionMode):
    """Sends attention to the fused kernel, as a CPU does; the meta device would take the unfused way.

    The unfused way keeps the attention matrix and scaled queries and keys for backward, which no fused one does.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> torch.Tensor:
    # the conditions under which torch's kernel for the CPU is taken
    heads_match = query.dim() == 4 and query.shape[:2] == key.shape[:2] and query.shape[-1] == value.shape[-1]
    mask_is_fixed = attn_mask is None or not attn_mask.requires_grad
    if not (heads_match and mask_is_fixed and dropout_p == 0.0 and query.is_meta):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    result: torch.Tensor = kernel(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=options.get("scale")
    )[0]
    return result


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
