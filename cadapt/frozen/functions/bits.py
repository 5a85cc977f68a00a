"""One bit per element: which elements of a tensor let the gradient through.

Three operators of torch's library, so that compiled and traced graphs take them as they are: `positive_bits` and
`inside_bits` say of every element whether it is let through, `masked_gradient` applies that to a gradient. The bits
follow the tensor's own order in memory, so a tensor in channels_last is not copied.

On the CPU the bits are packed by numpy, in pieces that the processor's cache holds. Elsewhere eight elements at a time
by a product of 64-bit numbers, and unpacked by a table: three operations each way, with a byte per element in between.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PIECE = 1 << 18
"""Elements in one piece; a multiple of 8, so that each piece fills whole bytes."""
PARALLEL = 1 << 19
"""Elements from which on the pieces are shared among threads."""

# 2⁶³ + 2⁵⁴ + … + 2⁰ as a signed number: 9 places apart, so that no two of eight bytes' bits meet
_GATHER = sum(1 << 9 * place for place in range(8)) - (1 << 64)
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def positive_bits(x: Tensor) -> Tensor:
    """Whether each element is above 0: uint8, ⌈elements / 8⌉, in x's order in memory.

    In 16-bit dtypes on the CPU a NaN with its sign set counts as negative.
    """
    bits: Tensor = torch.ops.cadapt.positive_bits(x)
    return bits


def inside_bits(x: Tensor, low: float, high: float) -> Tensor:
    """Whether each element is strictly between two bounds: uint8, ⌈elements / 8⌉, in x's order in memory."""
    bits: Tensor = torch.ops.cadapt.inside_bits(x, low, high)
    return bits


def masked_gradient(grad: Tensor, bits: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A gradient where the bits are set, zero elsewhere, laid out by the strides that the packed tensor had."""
    result: Tensor = torch.ops.cadapt.masked_gradient(grad, bits, list(strides))
    return result


def is_dense(x: Tensor) -> bool:
    """Whether a tensor's elements fill one stretch of memory without gaps or overlaps."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def flat(x: Tensor) -> Tensor:
    """The elements of a dense tensor in the order in which they lie in memory."""
    return x.as_strided((x.numel(),), (1,))


def _array(x: Tensor) -> "NDArray[np.signedinteger]":
    """The same as integers of the same width, which numpy knows for every dtype of torch."""
    array: NDArray[np.signedinteger] = flat(x).view(_INTEGERS[x.element_size()]).numpy()
    return array


def _in_pieces(elements: int, work: Callable[[int, int], None]) -> None:
    """Calls work(start, stop) for all pieces, on torch's number of threads where there is enough to do."""
    threads = torch.get_num_threads()
    starts = range(0, elements, PIECE)
    if threads == 1 or elements < PARALLEL:
        for start in starts:
            work(start, min(start + PIECE, elements))
        return
    # numpy lets go of the interpreter's lock inside its loops
    list(_pool(threads).map(lambda start: work(start, min(start + PIECE, elements)), starts))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="cadapt-bits")


def _pack(elements: int, alive: Callable[[int, int], "NDArray[np.bool_]"]) -> Tensor:
    packed = np.empty((elements + 7) // 8, dtype=np.uint8)

    def work(start: int, stop: int) -> None:
        packed[start // 8 : (stop + 7) // 8] = np.packbits(alive(start, stop))

    _in_pieces(elements, work)
    return torch.from_numpy(packed)


def _positive_bits_cpu(x: Tensor) -> Tensor:
    if x.dtype in (torch.float32, torch.float64):
        values = flat(x).numpy()
        # torch lets the gradient of a NaN through: "not at most 0", not "above 0"
        return torch.bitwise_not(_pack(x.numel(), lambda start, stop: values[start:stop] <= 0))
    # positive numbers are positive as integers, too
    integers = _array(x)
    return _pack(x.numel(), lambda start, stop: integers[start:stop] > 0)


def _inside_bits_cpu(x: Tensor, low: float, high: float) -> Tensor:
    values = flat(x)

    def alive(start: int, stop: int) -> "NDArray[np.bool_]":
        piece = values[start:stop]
        inside: NDArray[np.bool_] = torch.logical_and(piece > low, piece < high).numpy()
        return inside

    return _pack(x.numel(), alive)


def _masked_gradient_cpu(grad: Tensor, bits: Tensor, strides: list[int]) -> Tensor:
    grad = _laid_out(grad, strides)
    result = torch.empty_strided(grad.shape, strides, dtype=grad.dtype)
    source, target, packed = _array(grad), _array(result), bits.numpy()

    def work(start: int, stop: int) -> None:
        mask = np.unpackbits(packed[start // 8 : (stop + 7) // 8], count=stop - start)
        # integers times 0 or 1: no NaN comes of an infinite gradient
        np.multiply(source[start:stop], mask, out=target[start:stop])

    _in_pieces(grad.numel(), work)
    return result


def _laid_out(grad: Tensor, strides: list[int]) -> Tensor:
    """A gradient with the given strides, copied only if it has others (expanded ones, say)."""
    if grad.stride() == tuple(strides):
        return grad
    return torch.empty_strided(grad.shape, strides, dtype=grad.dtype, device=grad.device).copy_(grad)


def _pack_words(alive: Tensor) -> Tensor:
    missing = -alive.numel() % 8
    if missing:
        alive = torch.nn.functional.pad(alive, (0, missing))
    # eight bytes of 0 or 1 are one number, whose product has the eight bits, the first byte's on top, in its top byte
    return alive.view(torch.int64).mul_(_GATHER).view(torch.uint8)[7::8].contiguous()


def _positive_bits_words(x: Tensor) -> Tensor:
    return torch.bitwise_not(_pack_words(flat(x) <= 0))


def _inside_bits_words(x: Tensor, low: float, high: float) -> Tensor:
    values = flat(x)
    return _pack_words((values > low).logical_and_(values < high))


def _masked_gradient_words(grad: Tensor, bits: Tensor, strides: list[int]) -> Tensor:
    grad = _laid_out(grad, strides)
    alive = _words(grad.device).index_select(0, bits.int()).view(torch.bool)[: grad.numel()]
    result = torch.empty_strided(grad.shape, strides, dtype=grad.dtype, device=grad.device)
    torch.where(alive, flat(grad), torch.zeros((), dtype=grad.dtype, device=grad.device), out=flat(result))
    return result


@cache
def _words(device: torch.device) -> Tensor:
    """Of each byte its bits as eight bytes of 0 or 1, the top bit first, in one number: int64, [256]."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
    return torch.from_numpy(bits).view(torch.int64).flatten().to(device)


def _bits_fake(x: Tensor, *bounds: float) -> Tensor:
    return x.new_empty((prod(x.shape) + 7) // 8, dtype=torch.uint8)


def _masked_gradient_fake(grad: Tensor, bits: Tensor, strides: list[int]) -> Tensor:
    return grad.new_empty_strided(grad.shape, strides)


# plain registrations: `torch.library.custom_op` wraps each call in ten times as much Python
_LIBRARY = torch.library.Library("cadapt", "FRAGMENT")  # type: ignore[no-untyped-call]
_OPERATORS: dict[str, tuple[str, Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]]] = {
    "positive_bits": ("(Tensor x) -> Tensor", _positive_bits_cpu, _positive_bits_words, _bits_fake),
    "inside_bits": ("(Tensor x, float low, float high) -> Tensor", _inside_bits_cpu, _inside_bits_words, _bits_fake),
    "masked_gradient": (
        "(Tensor grad, Tensor bits, SymInt[] strides) -> Tensor",
        _masked_gradient_cpu,
        _masked_gradient_words,
        _masked_gradient_fake,
    ),
}


def _register() -> None:
    for name, (schema, on_cpu, elsewhere, fake) in _OPERATORS.items():
        _LIBRARY.define(name + schema, tags=(torch.Tag.needs_exact_strides,))  # type: ignore[no-untyped-call]
        _LIBRARY.impl(name, on_cpu, "CPU")  # type: ignore[no-untyped-call]
        for device in ("CUDA", "MPS", "XPU"):
            _LIBRARY.impl(name, elsewhere, device)  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"cadapt::{name}", fake, lib=_LIBRARY)


_register()
