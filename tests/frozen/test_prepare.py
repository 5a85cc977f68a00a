"""prepare(): what it refuses, what it shares with the model, and that the model and its file know nothing of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cadapt
from cadapt.errors import UsageError
from cadapt.frozen import MEMORIES, Memory, prepare
from cadapt.frozen.program import OWN
from cadapt.meta import meta_copy
from cadapt.train import config
from tests.frozen.programs import adapted, assert_equal_results, pictures, results, saved, toy
from tests.frozen.toys import CHANNELS, conv, framed
from tests.models import make_model

SINGLE = 1e-5


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ({"model": nn.Conv2d(3, 8, 3)}, "Conv2d is no adapted model", "cadapt.insert"),
        ({"memory": "mid"}, "no memory setting 'mid'", "min"),
        ({"memory": "plain"}, "no memory setting 'plain'", ""),
        ({"precision": "bf32"}, "no precision 'bf32'", "fp32"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        prepare(**{"model": adapted("plain", "conv-par"), **arguments})
    assert message in caught.value.message and "\n" not in caught.value.message
    assert hint in (caught.value.hint or "")


def test_a_prepared_model_is_not_prepared_again() -> None:
    with pytest.raises(UsageError, match="no adapted model"):
        prepare(prepare(adapted("plain", "conv-par")))


@pytest.mark.parametrize("memory", MEMORIES)
def test_an_optimizer_over_the_model_moves_both(memory: Memory) -> None:
    """Three steps through the program against three of a twin by itself, weight decay and momentum included."""
    models = [adapted("plain", "conv-par", classes=5).train() for _ in range(2)]
    runs = [models[0], prepare(models[1], memory=memory)]
    targets = torch.tensor([1, 4])
    losses: list[list[float]] = [[], []]
    for index, (model, run) in enumerate(zip(models, runs, strict=True)):
        trained = [item for item in model.parameters() if item.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9, weight_decay=0.01)
        torch.manual_seed(1)
        for _ in range(3):
            x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
            optimizer.zero_grad()
            loss = F.cross_entropy(run(x), targets)
            loss.backward()
            optimizer.step()
            losses[index].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert losses[0][0] != pytest.approx(losses[0][-1], rel=1e-3)
    one, other = (model.state_dict() for model in models)
    assert all(torch.allclose(one[name], other[name], rtol=1e-8, atol=1e-10) for name in one)
    # eval mode of the model itself, after training through the program
    x = pictures(models[1]).detach()
    assert torch.allclose(models[1].eval()(x), models[0].eval()(x), rtol=1e-8)


def test_the_model_and_its_file_are_as_they_were(tmp_path: Path) -> None:
    base = make_model("plain")
    model = cadapt.insert(base, "conv-par", num_classes=3)
    model.classes = ("a", "b", "c")
    cadapt.save(model, tmp_path / "before.safetensors")
    before = {name: (item.data_ptr(), item.clone()) for name, item in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    flags = [item.requires_grad for item in model.parameters()]
    prepared = prepare(model, memory="min")
    prepared(pictures(model)).sum().backward()
    cadapt.save(model, tmp_path / "after.safetensors")
    assert (tmp_path / "before.safetensors").read_bytes() == (tmp_path / "after.safetensors").read_bytes()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(
        after[name].data_ptr() == place and torch.equal(after[name], item) for name, (place, item) in before.items()
    )
    assert [name for name, _ in model.named_modules()] == names
    assert [item.requires_grad for item in model.parameters()] == flags


def test_parameters_are_the_model_s_own() -> None:
    model = adapted("plain", "conv-par")
    prepared = prepare(model)
    assert {id(item) for item in prepared.parameters()} == {id(item) for item in model.parameters()}
    own = list(prepared.root.get_submodule(OWN).buffers())
    assert own and not any(item.requires_grad for item in own)


def test_modes_are_the_model_s() -> None:
    """Whoever sets them: dropout in a module, in a block's function and in the model's own forward."""

    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.drop, self.fc = conv(inputs=3), nn.Dropout(0.5), nn.Linear(CHANNELS, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.dropout(self.drop(self.stem(x)).mean((2, 3)), 0.5, self.training))

    model = toy(Dropping(), "stem", "fc")
    prepared = prepare(model, channels_last=False)
    for setting in (model.train, prepared.eval, prepared.train, model.eval):
        setting()
        x = pictures(model)
        assert torch.equal(prepared(x), prepared(x)) is not model.training
        assert_equal_results(prepared, model)
    assert prepared.train() is prepared and model.training and prepared.training


def test_a_plan_that_trains_norms_may_be_prepared_in_eval_mode() -> None:
    model = toy(
        framed(lambda b, x: b.norm(b.conv(x)), conv=conv(), norm=nn.BatchNorm2d(CHANNELS)), "fc", bn_policy="train"
    )
    prepared = prepare(model)
    assert_equal_results(prepared, model.train())
    assert_equal_results(prepared, model.eval())


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("trait", ["plain", "same-padded", "layer-scaled"])
def test_other_batches_sizes_and_layouts(trait: str, memory: Memory) -> None:
    """What was decided from shapes at the model's own size holds at others."""
    model = adapted(trait, "conv-par", classes=5).train()
    prepared = prepare(model, memory=memory)
    for shape in ((1, 3, 64, 64), (3, 3, 47, 80), (2, 3, 96, 33)):
        x = torch.randn(shape, dtype=torch.float64)
        assert_equal_results(prepared, model, x.requires_grad_())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    assert_equal_results(prepared, model, x)
    assert_equal_results(prepare(model, memory=memory, channels_last=False), model, x)


def test_channels_last_lays_kernels_and_pictures_out() -> None:
    model = adapted("plain", "conv-par").to(memory_format=torch.channels_last)
    for asked in (True, False):
        kernels = [
            item for item in prepare(model, channels_last=asked).root.get_submodule(OWN).buffers() if item.dim() == 4
        ]
        wide = [item for item in kernels if item.shape[2] > 1 and item.shape[1] > 1]
        assert wide
        assert not asked or all(item.is_contiguous(memory_format=torch.channels_last) for item in wide)


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_twin_without_data(memory: Memory) -> None:
    """The cost is counted on such a one: the same tensors are kept, in number and shape, and nothing is shared."""
    model = adapted("plain", "conv-par")
    prepared = prepare(model, memory=memory)
    twin = meta_copy(prepared)
    assert all(item.is_meta for item in (*twin.parameters(), *twin.buffers()))
    assert not any(item.is_meta for item in (*prepared.parameters(), *prepared.buffers()))
    x = pictures(model).detach()
    kept, shadows = (
        saved(run, x.to(device), [*run.parameters(), *run.buffers()])
        for run, device in ((prepared, "cpu"), (twin, "meta"))
    )
    assert sorted(kept, key=str) == sorted(shadows, key=str)
    twin(x.to("meta")).sum().backward()
    grads = [item.grad for item in twin.parameters() if item.requires_grad]
    assert all(grad is not None and grad.is_meta for grad in grads)
    assert all(item.grad is None for item in model.parameters())


def test_a_model_that_is_on_meta_itself() -> None:
    model = cadapt.insert(meta_copy(make_model("layer-scaled")), "conv-par", num_classes=3)
    for memory in MEMORIES:
        assert prepare(model, memory=memory)(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 3)


def test_two_programs_of_one_model_side_by_side() -> None:
    """Neither knows of the other; each keeps less than the one that computes less again."""
    model = adapted("layer-scaled", "conv-par", classes=5)
    x = pictures(model).detach()
    plain = [*model.parameters(), *model.buffers()]
    prepared = {memory: prepare(model, memory=memory) for memory in MEMORIES}
    sizes = {"plain": saved(model, x, plain)}
    for memory, run in prepared.items():
        assert_equal_results(run, model)
        sizes[memory] = saved(run, x, [*plain, *run.root.get_submodule(OWN).buffers()])
    totals = {
        name: sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in kept) for name, kept in sizes.items()
    }
    assert totals["plain"] > totals["fast"] > totals["low"] >= totals["min"]


@pytest.mark.parametrize("memory", MEMORIES)
def test_single_precision(memory: Memory) -> None:
    model = adapted("plain", "conv-par", classes=5).float().train()
    assert_equal_results(prepare(model, memory=memory), model, tolerance=SINGLE)


def test_gradients_accumulate_and_clear_as_ever() -> None:
    model = adapted("plain", "conv-par", classes=5)
    prepared, x = prepare(model, memory="min"), pictures(model).detach()
    expected = {name: item for name, item in results(model, model, x).items() if name.startswith("gradient")}
    for _ in range(2):
        y = prepared(x)
        loss = (y * torch.linspace(-1.0, 2.0, y.numel(), dtype=y.dtype).view_as(y)).sum() + y.square().mean()
        loss.backward()
    for name, item in model.named_parameters():
        if item.requires_grad:
            assert item.grad is not None
            scale = float(expected[f"gradient of {name}"].abs().max())
            assert torch.allclose(
                item.grad, 2 * expected[f"gradient of {name}"], atol=1e-11 * max(scale, 1e-9), rtol=1e-9
            )


def test_training_and_the_engine_name_the_same_settings() -> None:
    """The command line reads train's without torch."""
    assert ("plain", *MEMORIES) == config.MEMORIES
