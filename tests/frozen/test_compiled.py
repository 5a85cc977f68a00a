"""The engine under torch.compile: one graph, the plain path's loss and gradients, and no more kept than without."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cadapt.adapted import AdaptedModel
from cadapt.bundle import load_bundle
from cadapt.frozen import Memory, prepare
from tests.cli.conftest import BASE
from tests.cli.program import run
from tests.data.pictures import make_classes
from tests.frozen.comparing import difference
from tests.frozen.programs import saved
from tests.frozen.test_every_base import adapted, losses_and_gradients
from tests.models import make_images

TRAITS = ("plain", "layer-scaled", "depth-wise", "windowed", "tokens")
"""Tiny kin of ResNet, ConvNeXt, EfficientNet, Swin and ViT."""


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def whole(step: Callable[..., Tensor], backend: str = "aot_eager") -> Callable[[Tensor], Tensor]:
    compiled: Callable[[Tensor], Tensor] = torch.compile(step, fullgraph=True, backend=backend)
    return compiled


def assert_as_plain(model: AdaptedModel, step: Callable[[Tensor], Tensor], images: Tensor, tolerance: float) -> None:
    loss, expected = losses_and_gradients(model, model, images)
    own_loss, found = losses_and_gradients(model, step, images)
    assert own_loss == pytest.approx(loss, rel=tolerance)
    largest = max(float(grad.abs().max()) for grad in expected.values() if grad is not None)
    for name, grad in expected.items():
        got = found[name]
        if grad is None or got is None:
            assert not any(item.any() for item in (grad, got) if item is not None), name
        else:
            assert float((got - grad).abs().max()) <= tolerance * largest, name


@pytest.mark.in_turn(2)
@pytest.mark.parametrize("trait", TRAITS)
def test_one_graph_and_the_same_gradients(trait: str) -> None:
    model = adapted(trait, "conv-par", torch.float64)
    assert_as_plain(model, whole(prepare(model, memory="low", channels_last=False)), make_images(trait).double(), 1e-9)


@pytest.mark.in_turn(2)
@pytest.mark.parametrize("memory", ["fast", "min"])
def test_the_other_settings(memory: Memory) -> None:
    model = adapted("layer-scaled", "conv-par", torch.float32)
    assert_as_plain(model, whole(prepare(model, memory=memory)), make_images("layer-scaled"), 1e-5)


def test_another_scheme() -> None:
    model = adapted("plain", "norm", torch.float32)
    assert_as_plain(model, whole(prepare(model, memory="low", channels_last=False)), make_images("plain"), 1e-5)


@pytest.mark.in_turn(2)
@pytest.mark.parametrize("memory", ["low", "min"])
def test_norms_that_train_count_a_batch_once(memory: Memory) -> None:
    model = adapted("plain", "conv-par", torch.float64, bn_policy="train")
    images = make_images("plain", batch=4).double()
    compiled = whole(prepare(model, memory=memory, channels_last=False))
    assert_as_plain(model, compiled, images, 1e-9)
    before = {name: item.clone() for name, item in model.named_buffers()}
    model(images)
    expected = {name: item.clone() for name, item in model.named_buffers()}
    model.load_state_dict(before, strict=False)
    compiled(images).sum().backward()
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, expected[name], rtol=1e-9, atol=1e-12, msg=name)


def test_the_last_smaller_batch() -> None:
    model = adapted("overwriting", "conv-par", torch.float64)
    compiled = whole(prepare(model, memory="low"))
    for batch in (4, 3, 1):
        assert_as_plain(model, compiled, make_images("overwriting", batch=batch).double(), 1e-9)


def test_a_step_moves_what_is_compiled() -> None:
    model = adapted("overwriting", "conv-par", torch.float64)
    images = make_images("overwriting").double()
    compiled = whole(prepare(model, memory="low"))
    losses_and_gradients(model, compiled, images)
    with torch.no_grad():
        for item in model.parameters():
            if item.requires_grad:
                item.add_(0.1 * torch.randn_like(item))
    assert difference(compiled(images), model(images)) <= 1e-9


def test_no_more_is_kept_than_without() -> None:
    model = adapted("layer-scaled", "conv-par", torch.float32)
    images = make_images("layer-scaled")
    own = [*model.parameters(), *model.buffers()]
    prepared = prepare(model, memory="low")
    own += list(prepared.buffers())
    compiled = whole(prepared)
    compiled(images).sum().backward()
    least, eager, plain = (size_bytes(saved(item, images, own)) for item in (compiled, prepared, model))
    # what passes from forward to backward includes products of small weights, which are as large as tiny maps
    assert least <= 1.1 * eager
    assert least < plain / 2


def size_bytes(kept: list[tuple[tuple[int, ...], torch.dtype]]) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in kept)


def test_by_inductor() -> None:
    model = adapted("overwriting", "conv-par", torch.float32)
    images = make_images("overwriting")
    assert_as_plain(model, whole(prepare(model, memory="low"), "inductor"), images, 1e-5)


def test_train_compile_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As without, from the first step to the file; a smaller last batch is among the steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    images = make_classes(tmp_path / "imgs", {"cat": 8, "dog": 7}, (20, 18))
    assert run("insert", *BASE, "-q").code == 0
    fixed = ("--epochs", "2", "--batch-size", "6", "--augment", "light", "--device", "cpu", "--workers", "0", "-q")
    losses = []
    for extra in ((), ("--compile",)):
        name = f"run{len(extra)}"
        ran = run("train", images, *fixed, "--memory", "low", *extra, "-o", f"{name}.safetensors", "--run", name)
        assert ran.code == 0, ran.stderr
        lines = [json.loads(line) for line in Path(name, "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if line["kind"] == "epoch"])
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    plain, compiled = (load_bundle(Path(f"run{number}.safetensors").read_bytes()).tensors for number in (0, 1))
    assert {name: item.shape for name, item in compiled.items()} == {name: item.shape for name, item in plain.items()}
