"""The engine in half precision: near the plain path and fp32, half the bytes, no frozen weight cast in a step.

What a GPU would do is run on tensors without data. Autograd's own engine asks for a driver, so these tests walk its
graph themselves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode

from cadapt.adapted import AdaptedModel
from cadapt.frozen import MEMORIES, Memory, prepare
from tests.frozen.programs import saved
from tests.frozen.test_every_base import adapted, losses_and_gradients
from tests.models import make_images

TRAITS = ("plain", "layer-scaled", "depth-wise", "windowed", "tokens")
"""Tiny kin of ResNet, ConvNeXt, EfficientNet, Swin and ViT."""
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# a few roundings' worth: bf16 has 8 bits, fp16 has 11, and a deep net adds them up
LOSS_BOUNDS, GRADIENT_BOUNDS = {"bf16": 0.03, "fp16": 0.01}, {"bf16": 0.05, "fp16": 0.02}
BATCH = 5
# autocast leaves sums with embeddings of positions in fp32, on a GPU norms too, and so all that is added to these
WIDE, WIDE_ON_CUDA = ("windowed", "tokens"), ("windowed", "tokens", "layer-scaled")


def in_half(run: Callable[[Tensor], Tensor], precision: str) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", HALVES[precision]):
            return run(x).float()

    return forward


def distance(ours: Mapping[str, Tensor | None], reference: Mapping[str, Tensor | None]) -> float:
    """Between all gradients as one vector, relative to its length."""
    pairs = [(ours[name], grad) for name, grad in reference.items() if grad is not None]
    error = sum(float((mine - other).double().square().sum()) for mine, other in pairs if mine is not None)
    return (error / sum(float(other.double().square().sum()) for _, other in pairs)) ** 0.5


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize(("trait", "precision"), [*((trait, "bf16") for trait in TRAITS), ("layer-scaled", "fp16")])
def test_near_the_plain_path_and_near_fp32(trait: str, precision: str, memory: Memory) -> None:
    model = adapted(trait, "conv-par", torch.float32)
    images = make_images(trait)
    exact, exact_grads = losses_and_gradients(model, model, images)
    plain, plain_grads = losses_and_gradients(model, in_half(model, precision), images)
    run = in_half(prepare(model, memory=memory, precision=precision), precision)
    ours, grads = losses_and_gradients(model, run, images)
    for loss, expected in ((exact, exact_grads), (plain, plain_grads)):
        assert ours == pytest.approx(loss, rel=LOSS_BOUNDS[precision])
        assert distance(grads, expected) <= GRADIENT_BOUNDS[precision]
    assert all(grad is None or grad.dtype == torch.float32 for grad in grads.values())


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("trait", TRAITS)
def test_about_half_of_the_bytes_are_kept(trait: str, memory: Memory) -> None:
    model = adapted(trait, "conv-par", torch.float32)
    images = make_images(trait, batch=BATCH)
    wide, half = (prepare(model, memory=memory, precision=precision) for precision in ("fp32", "bf16"))
    own = [*model.parameters(), *model.buffers(), *wide.buffers(), *half.buffers()]
    of_wide, of_half = saved(wide, images, own), saved(in_half(half, "bf16"), images, own)
    of_plain = saved(in_half(model, "bf16"), images, own)
    if trait not in WIDE:
        assert bytes_of(maps(of_half)) <= 0.55 * bytes_of(maps(of_wide))
    assert bytes_of(in_fp32(of_half)) <= 1.1 * bytes_of(in_fp32(of_plain))


Kept = Sequence[tuple[tuple[int, ...], torch.dtype]]


def maps(kept: Kept) -> Kept:
    """Of what is kept, all that depends on the pictures, by the number of those; windows are cut out of several."""
    return [item for item in kept if item[0] and item[0][0] % BATCH == 0]


def in_fp32(kept: Kept) -> Kept:
    return [item for item in maps(kept) if item[1] == torch.float32]


def bytes_of(kept: Kept) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in kept)


class Casts(TorchDispatchMode):
    """Notes the memory of each tensor that is copied into another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            self.places.append(args[0].untyped_storage().data_ptr())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("trait", TRAITS)
def test_frozen_weights_are_cast_once_and_not_each_step(trait: str) -> None:
    model = adapted(trait, "conv-par", torch.float32)
    prepared = prepare(model, precision="bf16")
    frozen = [item for item in model.parameters() if not item.requires_grad] + list(prepared.buffers())
    large = {item.untyped_storage().data_ptr(): tuple(item.shape) for item in frozen if item.ndim > 1}
    with Casts() as casts:
        in_half(prepared, "bf16")(make_images(trait)).sum().backward()
    assert casts.places
    assert [large[place] for place in casts.places if place in large] == []


@pytest.mark.parametrize("trait", ["plain", "layer-scaled"])
def test_trained_products_are_computed_in_fp32(trait: str) -> None:
    """α W in fp32, and then cast: what is small is not rounded twice."""
    model = adapted(trait, "conv-par", torch.float32)
    prepared = prepare(model, memory="fast", precision="bf16")
    found = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mul.Tensor and result.ndim == 4 and result.shape[2:] == (1, 1):
                found.append(result.dtype)
            return result

    with Products(), torch.no_grad():
        in_half(prepared, "bf16")(make_images(trait))
    assert found
    assert set(found) == {torch.float32}


# --- a GPU without one


@contextmanager
def cuda_autocast(dtype: torch.dtype) -> Iterator[None]:
    """`torch.autocast("cuda", …)`, which switches itself off where there is no driver."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


def on_cuda(model: AdaptedModel, mode: FakeTensorMode) -> AdaptedModel:
    """A twin of a model without data, on a GPU by name."""
    with FakeCopyMode(mode):
        twin = copy.deepcopy(model)
    with mode:
        for module in twin.modules():
            for name, item in module._parameters.items():
                if item is not None:
                    moved = item.detach().to("cuda")
                    module._parameters[name] = nn.Parameter(moved, requires_grad=item.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to("cuda")
    return twin


def walk(edges: Sequence[Any], grads: Sequence[Tensor]) -> dict[int, Tensor]:
    """What autograd's engine does, in Python: gradients of the leaves by their identity."""
    pending: dict[Any, dict[int, Tensor]] = {}
    found: dict[int, Tensor] = {}

    def send(node: Any, place: int, grad: Tensor | None) -> None:
        if node is not None and grad is not None:
            wanted = node._input_metadata[place]
            grad = grad.sum_to_size(wanted.shape).to(wanted.dtype)
            slot = pending.setdefault(node, {})
            slot[place] = slot[place] + grad if place in slot else grad

    for edge, grad in zip(edges, grads, strict=True):
        send(edge.node, edge.output_nr, grad)
    for node in in_order([edge.node for edge in edges]):
        given = pending.pop(node, None)
        if given is None:
            continue
        if hasattr(node, "variable"):
            found[id(node.variable)] = given[0]
            assert (given[0].shape, given[0].device) == (node.variable.shape, node.variable.device)
            continue
        for (following, place), grad in zip(*backward_of(node, given), strict=True):
            send(following, place, grad)
    return found


def in_order(roots: Sequence[Any]) -> list[Any]:
    """All nodes, each before those that it hands gradients to."""
    done: dict[Any, None] = {}
    seen: set[Any] = set()
    stack = [(root, False) for root in roots]
    while stack:
        node, finished = stack.pop()
        if finished:
            done.setdefault(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(following, False) for following, _ in node.next_functions if following is not None]
    return list(done)[::-1]


def backward_of(node: Any, given: dict[int, Tensor]) -> tuple[list[Any], list[Tensor | None]]:
    """The edges of a node that need a gradient, and their gradients."""
    arguments = [given.get(place) for place in range(max(given) + 1)]
    edges = [edge for edge in node.next_functions if edge[0] is not None]
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        results = node(*arguments)
        results = results if isinstance(results, tuple) else (results,)
        pairs = zip(node.next_functions, results, strict=True)
        return edges, [grad for edge, grad in pairs if edge[0] is not None]
    results = node.apply(*arguments)
    results = results if isinstance(results, tuple) else (results,)
    # a function of Python has results for all arguments, but edges for tensors only
    return edges, [grad for grad, needed in zip(results, node.needs_input_grad, strict=True) if needed]


def nested_grad(edges: Sequence[Any], sources: Sequence[Tensor], grads: Sequence[Tensor], **_: Any) -> Any:
    found = walk([edge if hasattr(edge, "node") else get_gradient_edge(edge) for edge in edges], grads)
    return tuple(found.get(id(source)) for source in sources)


def cuda_step(model: AdaptedModel, memory: Memory, precision: str, side: int) -> tuple[Kept, Kept]:
    """Forward and backward on a GPU by name; all that trains gets a gradient. Return what autograd keeps, and plain."""
    mode = FakeTensorMode()
    twin = on_cuda(model, mode)
    with mode:
        prepared = prepare(twin, memory=memory, precision=precision)
        own = [*twin.parameters(), *twin.buffers(), *prepared.buffers()]
        x = torch.empty(BATCH, 3, side, side, device="cuda")
        with cuda_autocast(HALVES[precision]):
            kept, plain = saved(prepared, x, own), saved(twin, x, own)
            y = prepared(x)
        loss = nn.functional.cross_entropy(y.float(), torch.zeros(BATCH, dtype=torch.long, device="cuda"))
        with torch.no_grad():
            found = walk([get_gradient_edge(loss)], [torch.ones((), device="cuda")])
    assert y.dtype == HALVES[precision]
    missing = [name for name, item in twin.named_parameters() if item.requires_grad and id(item) not in found]
    assert missing == []
    return kept, plain


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.autograd, "grad", nested_grad)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    for place in (torch, torch.cuda):
        monkeypatch.setattr(place, "get_rng_state", lambda *_: torch.zeros(16, dtype=torch.uint8))
        monkeypatch.setattr(place, "set_rng_state", lambda *_: None)


@pytest.mark.in_turn(3)
@pytest.mark.usefixtures("no_driver")
@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("trait", TRAITS)
def test_on_a_gpu_by_name(trait: str, memory: Memory, precision: str) -> None:
    side = make_images(trait).shape[-1]
    kept, plain = cuda_step(adapted(trait, "conv-par", torch.float32), memory, precision, side)
    assert bytes_of(in_fp32(kept)) <= 1.1 * bytes_of(in_fp32(plain))
    if trait not in WIDE_ON_CUDA:
        assert bytes_of(in_fp32(kept)) <= 0.05 * bytes_of(maps(kept))
