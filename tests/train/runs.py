"""A tiny model and synthetic batches for the engine's tests, and runs in processes of their own that may be killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

from cadapt.errors import CadaptError
from cadapt.train import FitData, RunFolder, TrainConfig, fit

CLASSES = 3
CONFIG = TrainConfig(
    epochs=3,
    batch_size=4,
    lr=1e-2,
    warmup_epochs=0,
    mixup=0.4,
    cutmix=0.5,
    label_smoothing=0.1,
    ema=0.9,
    clip_grad=1.0,
    log_every_steps=2,
    save_every_seconds=0.0,
    device="cpu",
)


class Block(nn.Module):
    """A frozen convolution and norm, with a trainable adapter, drop-path and dropout beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1).requires_grad_(False)
        self.norm = nn.BatchNorm2d(6)
        self.adapter = nn.Conv2d(3, 6, 1)
        self.scale = nn.Parameter(torch.ones(1, 6, 1, 1))
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        keep = 1.0
        if self.training:
            keep = (torch.rand(len(images), 1, 1, 1, dtype=images.dtype) < 0.8).to(images.dtype)
        features = torch.relu(self.norm(self.conv(images)) + keep * self.scale * self.adapter(images))
        return self.head(self.dropout(features.mean((2, 3))))


def make_model(seed: int = 0) -> Block:
    torch.manual_seed(seed)
    return Block()


@dataclass(frozen=True)
class Images(Dataset):
    count: int
    seed: int = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        label = index % CLASSES
        return torch.randn(3, 6, 6, generator=generator) + label - 1.0, label


@dataclass(frozen=True)
class Loader:
    """Batches in an order drawn from the epoch; with workers, made by a DataLoader."""

    images: Images
    batch_size: int = 4
    workers: int = 0

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def batches(self, epoch: int, start_step: int = 0):
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(epoch)).tolist()
        groups = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        yield from DataLoader(
            self.images,
            batch_sampler=groups[start_step:],
            num_workers=self.workers,
            # named, because the processes of these tests would start theirs by way of a second server
            multiprocessing_context="fork" if self.workers else None,
        )


def make_data(count: int = 22, workers: int = 0, batch_size: int = 4) -> FitData:
    return FitData(
        train=Loader(Images(count), batch_size, workers),
        classes=("a", "b", "c"),
        validation=lambda: DataLoader(Images(9, seed=1), batch_size=4),
        record={"images": count},
    )


def save_weights(path: Path, model: nn.Module, record: dict) -> None:
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path, metadata={"record": json.dumps(record)})


def load_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["record"])  # noqa: SIM118


def run(
    folder: Path | None, config: TrainConfig = CONFIG, *, resume: bool = False, data: FitData | None = None, **more
):
    """Fit a fresh model; return it and the result."""
    model = more.pop("model", None) or make_model()
    place = None if folder is None else RunFolder(path=folder, resume=resume)
    more = {"on_event": None, "save_weights": save_weights} | more
    result = fit(model, data or make_data(), config, run=place, **more)
    return model, result


def run_in_process(
    folder: Path, workers: int = 0, *, resume: bool = False, signals: dict[int, str] | None = None
) -> int:
    """Fit in a fresh process and return its exit code, negative for the signal that killed it.

    ``signals`` are sent by the process to itself at its n-th save, when the weights are written and the state is not:
    the two files are then of different steps.
    """
    # the server imports torch once, and each run is forked from it: fresh, but without seconds of imports
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cadapt.train.engine", "torch.utils.tensorboard"])
    process = context.Process(target=_child, args=(folder, workers, resume, signals or {}))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def _child(folder: Path, workers: int, resume: bool, signals: dict[int, str]) -> None:
    torch.set_num_threads(1)
    saves = 0

    def save_and_signal(path: Path, model: nn.Module, record: dict) -> None:
        nonlocal saves
        save_weights(path, model, record)
        saves += path.name == "last.safetensors"
        if saves in signals and path.name == "last.safetensors":
            os.kill(os.getpid(), signal.Signals[signals[saves]])

    try:
        run(folder, resume=resume, data=make_data(workers=workers), save_weights=save_and_signal)
    except CadaptError as error:
        (folder / "error.txt").write_text(f"{error.message} | {error.hint}")
        sys.exit(error.exit_code)
