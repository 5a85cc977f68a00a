from __future__ import annotations

import json
import signal
import threading
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from cadapt.errors import CadaptError, InterruptedRunError, UsageError
from cadapt.train import EpochDone, FitData, Notice, RunStarted, Saved, StepDone, TrainConfig

from .runs import CONFIG, Images, Loader, load_weights, make_data, make_model, run, run_in_process

PLAIN = TrainConfig(epochs=2, batch_size=4, lr=1e-2, warmup_epochs=0, device="cpu")


def trainable(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters() if tensor.requires_grad}


def test_the_run_leaves_its_record_and_files(tmp_path):
    _, result = run(tmp_path / "run", PLAIN)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert TrainConfig.from_json(record["config"]) == PLAIN
    assert record["data"] == {"images": 22}
    assert {"cadapt", "torch", "timm", "python"} <= record["versions"].keys()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert [line["epoch"] for line in epochs] == [1, 2]
    assert {"step", "loss", "top1", "lr", "images_per_second", "val_loss", "val_top1"} <= epochs[0].keys()
    assert list((tmp_path / "run" / "tb").glob("events*"))
    _, weights_record = load_weights(tmp_path / "run" / "last.safetensors")
    assert weights_record["epochs"] == 2
    assert weights_record["metrics"] == result.final
    assert json.loads(json.dumps(result.to_json()))["loss_curve"] == [line["loss"] for line in epochs]
    assert result.steps == 12
    assert result.images_per_second > 0
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, result = run(None, PLAIN)
    assert result.epochs == 2
    assert not model.training
    assert not list(tmp_path.iterdir())


def test_a_run_depends_on_the_seed_alone():
    models = [run(None, replace(CONFIG, seed=seed))[0] for seed in (0, 0, 1)]
    torch.rand(3)
    first, same, other = (trainable(model) for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["adapter.weight"], other["adapter.weight"])


def test_requires_grad_is_never_touched():
    model = make_model()
    before = {name: tensor.requires_grad for name, tensor in model.named_parameters()}
    run(None, PLAIN, model=model)
    assert before == {name: tensor.requires_grad for name, tensor in model.named_parameters()}


def test_nothing_to_train_is_said():
    with pytest.raises(UsageError, match="nothing to train"):
        run(None, PLAIN, model=make_model().requires_grad_(False))


class Plain(nn.Module):
    """Nothing random and no batch statistics: what accumulation must not change."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
        )

    def forward(self, images):
        return self.layers(images.double())


def test_accumulation_equals_a_large_batch():
    # 22 images: the last step of an epoch takes 6 images, in batches of 4 and 2
    large = run(None, replace(PLAIN, batch_size=8), model=Plain().double(), data=make_data(batch_size=8))[0]
    small = run(None, replace(PLAIN, accumulate=2), model=Plain().double(), data=make_data(batch_size=4))[0]
    for name, tensor in trainable(large).items():
        torch.testing.assert_close(trainable(small)[name], tensor, rtol=1e-10, atol=1e-12)


def test_accumulation_resumes_at_the_right_batch(tmp_path):
    config = replace(CONFIG, accumulate=2, epochs=2)
    reference, _ = run(None, config)

    def stop(event):
        if isinstance(event, Saved) and (event.epoch, event.step) == (1, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", config, on_event=stop)
    resumed, _ = run(tmp_path / "run", config, resume=True)
    for name, tensor in trainable(reference).items():
        assert torch.equal(trainable(resumed)[name], tensor)


def test_one_step_follows_adamw_with_the_scheduled_rate():
    model, reference = Plain().double(), Plain().double()
    data = make_data(count=4)
    run(None, replace(PLAIN, epochs=1), model=model, data=data)
    optimizer = torch.optim.AdamW(
        [
            {"params": [tensor for tensor in reference.parameters() if tensor.ndim > 1], "weight_decay": 1e-4},
            {"params": [tensor for tensor in reference.parameters() if tensor.ndim == 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
    )
    images, labels = next(data.train.batches(0))
    nn.functional.cross_entropy(reference(images), labels).backward()
    optimizer.step()
    for name, tensor in trainable(reference).items():
        torch.testing.assert_close(trainable(model)[name], tensor, rtol=1e-10, atol=1e-12)


@dataclass
class Scripted:
    """Validation accuracy and loss per epoch, by way of labels that fit the model's constant answer."""

    shares: list[float]

    def __call__(self):
        share = self.shares.pop(0)
        labels = torch.zeros(10, dtype=torch.int64)
        labels[round(10 * share) :] = 1
        yield torch.zeros(10, 3, 6, 6), labels


class Constant(nn.Module):
    """Answers class 0, whatever it is shown, while weight decay moves its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, images):
        return torch.tensor([5.0, 0.0, 0.0]).expand(len(images), 3) + 0.0 * self.weight.sum()


@pytest.mark.parametrize(("shares", "best"), [([0.2, 0.9, 0.5], 2), ([0.5, 0.5, 0.5], 1), ([0.1, 0.2, 0.3], 3)])
def test_the_best_epoch_is_that_of_the_best_accuracy(shares, best):
    data = FitData(train=Loader(Images(8)), classes=("a", "b", "c"), validation=Scripted(list(shares)))
    _, result = run(None, replace(PLAIN, epochs=3), data=data, model=Constant())
    assert result.best_epoch == best
    assert result.best["val_top1"] == pytest.approx(shares[best - 1])
    assert result.final["val_top1"] == pytest.approx(shares[-1])


def test_without_validation_the_last_epoch_is_the_best(tmp_path):
    data = replace(make_data(), validation=None)
    model, result = run(tmp_path / "run", PLAIN, data=data)
    assert result.best_epoch == 2
    assert "val_top1" not in result.best
    best, last = (load_weights(tmp_path / "run" / name)[0] for name in ("best.safetensors", "last.safetensors"))
    assert all(torch.equal(best[name], tensor) for name, tensor in last.items())
    assert all(torch.equal(best[name], tensor) for name, tensor in model.state_dict().items())


def test_keep_says_which_weights_the_model_ends_with(tmp_path):
    for keep in ("best", "last"):
        shares = FitData(train=Loader(Images(8)), classes=("a", "b", "c"), validation=Scripted([0.9, 0.1]))
        model = Constant()
        run(tmp_path / keep, replace(PLAIN, keep=keep, weight_decay=0.5), data=shares, model=model)
        kept, _ = load_weights(tmp_path / keep / f"{keep}.safetensors")
        other, _ = load_weights(tmp_path / keep / ("last.safetensors" if keep == "best" else "best.safetensors"))
        assert torch.equal(model.weight, kept["weight"])
        assert not torch.equal(model.weight, other["weight"])


def test_events_tell_the_whole_run(tmp_path):
    events = []
    run(tmp_path / "run", replace(PLAIN, warmup_epochs=5), on_event=events.append)
    assert isinstance(events[0], RunStarted)
    assert events[0].trainable_parameters == sum(tensor.numel() for tensor in trainable(make_model()).values())
    assert [event.message for event in events if isinstance(event, Notice)] == ["warm-up cut from 5 to 0 of 2 epochs"]
    assert [event.epoch for event in events if isinstance(event, EpochDone)] == [1, 2]
    steps = [event for event in events if isinstance(event, StepDone)]
    assert (steps[0].epoch, steps[0].step, steps[0].steps) == (1, 1, 6)
    assert (steps[-1].epoch, steps[-1].step) == (2, 6)
    assert sum(isinstance(event, Saved) for event in events) == 2


class Breaking(nn.Module):
    """Gives NaN from a number of training batches on."""

    def __init__(self, good: int, error: Exception | None = None) -> None:
        super().__init__()
        self.inner = make_model()
        self.left, self.error = good, error

    def forward(self, images):
        self.left -= self.training
        if self.left < 0:
            if self.error is not None:
                raise self.error
            return self.inner(images) * float("nan")
        return self.inner(images)


def test_a_loss_that_is_not_finite_stops_and_keeps_what_was_saved(tmp_path):
    config = replace(PLAIN, save_every_seconds=0.0)
    with pytest.raises(CadaptError, match=r"not finite at step 9") as caught:
        run(tmp_path / "run", config, model=Breaking(8))
    assert caught.value.exit_code == 1
    assert "--lr" in caught.value.hint
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert (state["ledger"]["epoch"], state["ledger"]["step"]) == (1, 2)
    assert all(torch.isfinite(tensor).all() for tensor in state["tensors"].values())


def test_ruined_weights_are_never_saved(tmp_path):
    model = make_model()
    model.adapter.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(CadaptError, match=r"adapter\.weight.* not finite"):
        run(tmp_path / "run", replace(PLAIN, save_every_seconds=0.0), model=model)
    assert not (tmp_path / "run" / "state.pt").exists()


def test_out_of_memory_suggests_half_the_batch():
    with pytest.raises(CadaptError, match="out of memory with 4 images") as caught:
        run(None, PLAIN, model=Breaking(2, torch.OutOfMemoryError("CUDA out of memory")))
    assert "--batch-size 2 --accumulate 2" in caught.value.hint


def test_a_loader_that_ends_early_is_noticed():
    class Short(Loader):
        def batches(self, epoch, start_step=0):
            yield from list(super().batches(epoch, start_step))[:3]

    with pytest.raises(CadaptError, match="3 steps in epoch 1, expected 6"):
        run(None, PLAIN, data=replace(make_data(), train=Short(Images(22))))


def test_no_validation_images_is_said():
    with pytest.raises(CadaptError, match="no images"):
        run(None, PLAIN, data=replace(make_data(), validation=lambda: iter(())))


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_the_process_with_everything_saved(tmp_path, name, code):
    folder = tmp_path / "run"
    assert run_in_process(folder, workers=2, signals={8: name}) == code
    message = (folder / "error.txt").read_text()
    assert f"stopped by {name}" in message
    assert "--resume" in message
    assert run_in_process(folder, workers=2, resume=True) == 0


def test_a_signal_stops_after_the_current_step(tmp_path):
    def interrupt(event):
        if isinstance(event, StepDone) and event.epoch == 2:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    config = replace(PLAIN, save_every_seconds=1e6)
    with pytest.raises(InterruptedRunError, match="stopped by SIGINT after epoch 1 of 2 and [16] of 6") as caught:
        run(tmp_path / "run", config, on_event=interrupt)
    assert caught.value.exit_code == 130
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    resumed, _ = run(tmp_path / "run", config, resume=True)
    reference, _ = run(None, config)
    for tensor_name, tensor in trainable(reference).items():
        assert torch.equal(trainable(resumed)[tensor_name], tensor)


def test_a_second_interrupt_quits_at_once():
    def interrupt(event):
        if isinstance(event, StepDone):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(None, PLAIN, on_event=interrupt)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_it_runs_in_a_thread_without_handlers():
    results = []
    thread = threading.Thread(target=lambda: results.append(run(None, PLAIN)[1]))
    thread.start()
    thread.join()
    assert results[0].epochs == 2


@pytest.mark.parametrize("change", [{"precision": "bf16"}, {"channels_last": False}, {"ema": 0.5}])
def test_the_variants_train(change):
    _, result = run(None, replace(PLAIN, epochs=6, **change))
    assert result.loss_curve[-1] < result.loss_curve[0]
    assert result.precision == change.get("precision", "fp32")
