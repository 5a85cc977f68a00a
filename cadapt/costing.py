"""What a model costs: its parameters, multiply–accumulates and the bytes that training it keeps for backward.

Everything is counted on a twin without data (:mod:`cadapt.meta`), so that any model is counted in about a second and
none is touched. ``cadapt cost`` and the comparison of schemes are built on it.

Convention ``macs`` counts the multiply–accumulates of convolutions, linear layers, matrix products and attention, and
nothing else. ``paper`` is the counter of the Conv-Adapter paper (arXiv 2208.07463, table 10), which adds one for each
output of a convolution with a bias and of a ReLU (PReLU, ReLU6, ELU and leaky ReLU too), and two for each output of a
batch or group norm; it adds nothing for linear biases, GELU, SiLU, layer norms, scales and sums. It gives 4.12 G for
ResNet-50 BiT and 15.36 G for ConvNeXt-B at 224 px.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from cadapt.errors import CadaptError, UsageError, close_matches
from cadapt.meta import meta_copy

Convention = Literal["macs", "paper"]
CONVENTIONS: tuple[Convention, ...] = ("macs", "paper")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one model costs at one input size.

    ``macs`` are multiply–accumulates of one image's forward pass in eval mode, by ``convention``. ``activation_bytes``
    are what autograd keeps for backward from one forward pass in train mode over a batch of ``batch`` images: the input
    where a layer needs it, and standardised copies of weights, but not parameters or buffers. It is 0 where
    ``training`` is false.
    """

    parameters: int
    trainable_parameters: int
    macs: int
    activation_bytes: int
    input_size: tuple[int, int, int]
    batch: int
    training: bool
    convention: Convention

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {**asdict(self), "input_size": list(self.input_size)}


def cost(
    model: nn.Module,
    input_size: Sequence[int] = (3, 224, 224),
    *,
    batch: int = 1,
    training: bool = True,
    convention: Convention = "macs",
) -> Cost:
    """Count what a model costs, on a twin without data; the model itself is not run, moved or changed.

    ``convention`` is ``macs`` or ``paper``; the module's text says what each counts.

    What activation checkpointing keeps, and what a custom autograd function keeps without ``save_for_backward``,
    is not seen.

    Args:
        model: any module that maps images to a tensor or to tensors.
        input_size: channels, height and width of one image, in pixels.
        batch: images in a training step, for ``activation_bytes``.
        training: whether to count ``activation_bytes``.
        convention: how to count ``macs``.

    Raises:
        UsageError: the input size, the batch or the convention makes no sense.
        CadaptError: the forward pass fails, or needs values where a twin has only shapes; it names the operator.

    >>> cost(nn.Conv2d(3, 8, 3, bias=False), (3, 10, 10)).macs
    13824
    """
    size = _checked(input_size, batch, convention)
    twin = meta_copy(model)
    kept = _activation_bytes(twin.train(), (batch, *size)) if training else 0
    parameters = list(model.parameters())
    return Cost(
        parameters=sum(parameter.numel() for parameter in parameters),
        trainable_parameters=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        # torch's counter fails on a module that is fed a view of a parameter that wants a gradient
        macs=_macs(twin.eval().requires_grad_(False), size, convention),
        activation_bytes=kept,
        input_size=size,
        batch=batch,
        training=training,
        convention=convention,
    )


def count_activations(twin: nn.Module, input_size: Sequence[int] = (3, 224, 224), *, batch: int = 1) -> int:
    """Count what autograd keeps of one training step, in bytes, as ``activation_bytes`` of :class:`Cost` says.

    Args:
        twin: a model whose tensors are all on the meta device; it is put in train mode.
        input_size: channels, height and width of one image, in pixels.
        batch: images in the step.

    Raises:
        UsageError: the input size or the batch makes no sense.
        CadaptError: the forward pass fails, as :func:`cost` says.
    """
    return _activation_bytes(twin.train(), (batch, *_checked(input_size, batch, "macs")))


def _checked(input_size: Sequence[int], batch: int, convention: str) -> tuple[int, int, int]:
    if convention not in CONVENTIONS:
        raise UsageError(f"unknown counting convention '{convention}'", hint=close_matches(convention, CONVENTIONS))
    if batch < 1:
        raise UsageError(f"batch is {batch}, expected 1 or more")
    if len(input_size) != 3 or min(input_size) < 1:
        raise UsageError(f"input size is {tuple(input_size)}, expected channels, height and width, as (3, 224, 224)")
    channels, height, width = input_size
    return channels, height, width


def _example(model: nn.Module, shape: Sequence[int]) -> torch.Tensor:
    floating = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return torch.empty(tuple(shape), dtype=next(floating, torch.get_default_dtype()), device="meta")


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


class _FusedAttention(TorchFunctionMode):
    """Sends attention to the fused kernel, as real devices do; the meta device would take the unfused way.

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


@contextmanager
def _on_meta(model: nn.Module, shape: Sequence[int]) -> Iterator[None]:
    """Run a meta forward so that it leaves no trace outside and a failure names its operator."""
    operator = _RunningOperator()  # type: ignore[no-untyped-call]
    try:
        # python code of a model may draw random numbers, which must not shift those of the training around us
        with torch.random.fork_rng(devices=[]), _FusedAttention(), operator:
            yield
    except Exception as error:
        where = f" at {operator.name}" if operator.name else ""
        line = next(iter(str(error).splitlines()), type(error).__name__)
        size = "×".join(str(extent) for extent in shape)
        raise CadaptError(
            f"cannot count {type(model).__name__} for an input of {size}: its forward fails{where}: {line}",
            hint="counting runs the model on shapes without values: check the input size, and what reads values",
        ) from error


def _macs(model: nn.Module, size: Sequence[int], convention: Convention) -> int:
    mapping = {**_ATTENTION, **(_PAPER if convention == "paper" else {})}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    shape = (1, *size)
    with _on_meta(model, shape), torch.no_grad(), counter:
        model(_example(model, shape))
    return int(counter.get_total_flops()) // 2


class _Kept:
    """Stands for one tensor that autograd keeps; it lives as long as the graph node that keeps it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        # the storage alone, for a node that kept its own output through us would never be freed
        self.storage = tensor.untyped_storage()


def _activation_bytes(model: nn.Module, shape: Sequence[int]) -> int:
    references: list[weakref.ref[_Kept]] = []

    def keep(tensor: torch.Tensor) -> _Kept:
        kept = _Kept(tensor)
        references.append(weakref.ref(kept))
        return kept

    with _on_meta(model, shape), torch.enable_grad(), saved_tensors_hooks(keep, _never_read):
        outputs = model(_example(model, shape))
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    # on the meta device data pointers are all 0: the storage object itself tells one from another
    alive = [kept for reference in references if (kept := reference()) is not None]
    sizes = {kept.storage._cdata: kept.storage.nbytes() for kept in alive}
    del outputs  # held until here: what no output depends on is freed, and rightly not counted
    return sum(count for identity, count in sizes.items() if identity not in own)


def _never_read(kept: _Kept) -> torch.Tensor:
    raise AssertionError(f"nothing runs backward while counting, yet {kept} was asked for")


def _elements(*args: Any, out_shape: Sequence[int], **kwargs: Any) -> int:
    return 2 * math.prod(out_shape)


def _biased_convolution(
    x_shape: Any, w_shape: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, *args: Any,
    out_shape: Any, **kwargs: Any,
) -> int:  # fmt: skip
    doubled = int(conv_flop_count(x_shape, w_shape, out_shape, transposed=transposed))
    return doubled + (0 if bias is None else _elements(out_shape=out_shape))


def _group_norm(*args: Any, out_shape: Any, **kwargs: Any) -> int:
    return 2 * _elements(out_shape=out_shape[0])


def _batch_norm(x: Any, weight: Any, bias: Any, mean: Any, *args: Any, out_shape: Any, **kwargs: Any) -> int:
    # without running statistics it is no layer but a standardisation of weights written as a batch norm
    return 0 if mean is None else 2 * _elements(out_shape=out_shape[0])


def _attention_products(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[2] * (width + value[3])


_aten = torch.ops.aten
# operators that some versions of torch do not count, or do not count this way; values are twice the MACs
_ATTENTION: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_products,
}
_PAPER: dict[Any, Callable[..., int]] = {
    _aten.convolution: _biased_convolution,
    _aten.native_group_norm: _group_norm,
    _aten.native_batch_norm: _batch_norm,
    **{
        getattr(_aten, name): _elements
        for kind in ("relu", "hardtanh", "elu", "leaky_relu", "_prelu_kernel", "relu6")
        for name in (kind, f"{kind}_")
        if hasattr(_aten, name)
    },
}
