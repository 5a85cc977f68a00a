from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cadapt.errors import RefusedError
from cadapt.train import TrainConfig
from cadapt.train.ledger import is_better
from cadapt.train.meter import Meter
from cadapt.train.result import thinned
from cadapt.train.stepper import Stepper, grouped, make_optimizer
from cadapt.train.weights import Average, Learnt

from .runs import CONFIG, make_data, make_model

CPU = torch.device("cpu")


def test_weight_decay_spares_biases_norms_and_scales():
    model = make_model()
    optimizer = make_optimizer(model, TrainConfig(weight_decay=0.1))
    decayed = {id(tensor) for group in optimizer.param_groups if group["weight_decay"] for tensor in group["params"]}
    known = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
    names = {name for name, tensor in model.named_parameters() if id(tensor) in decayed}
    assert names == {"adapter.weight", "head.weight"}
    assert known == {id(tensor) for tensor in model.parameters() if tensor.requires_grad}


def test_the_average_follows_its_formula_and_copies_only_what_trains():
    model = make_model()
    learnt = Learnt(model)
    average = Average(learnt.parameters, decay=0.5)
    expected = {}
    for step in range(1, 6):
        with torch.no_grad():
            for tensor in learnt.parameters.values():
                tensor.add_(torch.randn_like(tensor))
        average.update(step)
        decay = 0.0 if step == 1 else min(0.5, 1 - (1 + step - 1) ** (-2 / 3))
        for name, tensor in learnt.parameters.items():
            old = expected.get(name, torch.zeros_like(tensor))
            expected[name] = decay * old + (1 - decay) * tensor.detach()
    own = learnt.capture()
    with average.swapped_in():
        for name, tensor in learnt.parameters.items():
            torch.testing.assert_close(tensor.detach(), expected[name], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(tensor, own[name]) for name, tensor in learnt.capture().items())
    assert len(average.state()) == len(learnt.parameters)


def test_capture_leaves_out_what_is_frozen():
    model = make_model()
    assert {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"} <= Learnt(model).capture().keys()
    assert "conv.weight" not in Learnt(model).capture()
    model.norm.eval()
    assert "norm.running_mean" not in Learnt(model).capture()


def test_restore_refuses_other_shapes():
    learnt = Learnt(make_model())
    captured = learnt.capture() | {"head.bias": torch.zeros(7)}
    with pytest.raises(RefusedError, match=r"head\.bias.*\(7,\), expected \(3,\)"):
        learnt.restore(captured)


class Recording(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 36, 3)
        self.seen = []

    def forward(self, images):
        self.seen.append(images.detach().clone())
        return self.layer(images.flatten(1))


def make_stepper(model, config):
    learnt = Learnt(model)
    return Stepper(model, learnt, config, class_count=3, device=CPU, precision="fp32")


@pytest.mark.parametrize("batch_size", [4, 5, 1])
def test_mixup_depends_on_the_position_alone_and_keeps_odd_images(batch_size):
    batch = next(make_data(batch_size=batch_size).train.batches(0))
    seen = []
    for epoch, step in ((0, 3), (0, 3), (1, 3)):
        model = Recording()
        config = replace(CONFIG, mixup=1.0, cutmix=0.0)
        torch.rand(epoch + step)
        make_stepper(model, config).step([batch], lr=0.1, epoch=epoch, step=step, steps_done=1, meters=())
        seen.append(model.seen[0])
    assert torch.equal(seen[0], seen[1])
    assert batch_size == 1 or not torch.equal(seen[0], seen[2])
    assert batch_size % 2 == 0 or torch.equal(seen[0][-1], batch[0][-1])


def test_the_meter_adds_up():
    meter, other = Meter(CPU), Meter(CPU)
    meter.add(torch.tensor(3.0), torch.tensor(1), 4)
    meter.add(torch.tensor(1.0), torch.tensor(2), 4)
    other.load_state(meter.state())
    for one in (meter, other):
        means = one.read()
        assert (means.loss, means.top1, means.images) == (0.5, 0.375, 8)
    meter.reset()
    assert meter.read().images == 0


def test_the_loss_is_the_smoothed_cross_entropy():
    model = Recording()
    images, labels = next(make_data().train.batches(0))
    expected = nn.functional.cross_entropy(model(images), labels, label_smoothing=0.1).item()
    meter = Meter(CPU)
    config = TrainConfig(label_smoothing=0.1, device="cpu")
    make_stepper(model, config).step([(images, labels)], lr=0.1, epoch=0, step=0, steps_done=1, meters=(meter,))
    assert meter.read().loss == pytest.approx(expected, rel=1e-6)


def test_gradients_are_clipped():
    images, labels = next(make_data().train.batches(0))
    model = Recording()
    config = TrainConfig(clip_grad=1e-3, device="cpu")
    make_stepper(model, config).step([(100 * images, labels)], lr=0.1, epoch=0, step=0, steps_done=1, meters=())
    norm = torch.cat([tensor.grad.flatten() for tensor in model.parameters()]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_grouping():
    assert list(grouped(iter("abcde"), 2)) == [["a", "b"], ["c", "d"], ["e"]]


def test_ties_go_to_the_lower_loss_then_to_the_earlier_epoch():
    best = {"val_top1": 0.9, "val_loss": 0.3}
    assert is_better({"val_top1": 0.9, "val_loss": 0.2}, best)
    assert not is_better(best, best)
    assert is_better({"val_top1": 0.91, "val_loss": 9.0}, best)
    assert is_better({"loss": 2.0}, {"loss": 1.0})


def test_thinning_keeps_both_ends():
    curve = tuple(float(value) for value in range(1000))
    short = thinned(curve)
    assert len(short) == 50
    assert (short[0], short[-1]) == (0.0, 999.0)


def stepper_on(device: str, *, channels_last: bool) -> Stepper:
    model = make_model()
    config = replace(CONFIG, channels_last=channels_last)
    return Stepper(model, Learnt(model), config, class_count=3, device=torch.device(device), precision="fp32")


@pytest.mark.parametrize("channels_last", [True, False])
def test_batches_come_in_the_format_of_the_settings(channels_last):
    """The loader's are pixel by pixel, whatever the settings."""
    given = torch.rand(2, 5, 4, 3).permute(0, 3, 1, 2)
    images, _ = stepper_on("cpu", channels_last=channels_last).to_device(given, torch.zeros(2))
    assert torch.equal(images, given)
    assert images.is_contiguous(memory_format=torch.channels_last) is channels_last
    assert images.is_contiguous() is not channels_last


@pytest.mark.parametrize(("device", "waits"), [("cuda", False), ("mps", True)])
def test_only_cuda_copies_what_may_be_written_to_meanwhile(device, waits):
    asked = []

    class Moves(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is not torch.Tensor.to:
                return func(*args, **(kwargs or {}))
            asked.append(kwargs["non_blocking"])
            return args[0]

    stepper = stepper_on(device, channels_last=True)
    with Moves():
        stepper.to_device(torch.rand(2, 3, 4, 4), torch.zeros(2))
    assert asked == [not waits] * 2
