"""Images per second from files to a training batch, against torchvision: ``python -m tests.benchmarks.data_path``.

Both read the same files into batches [64, 3, 224, 224] float32, in turns, one batch after the other: torchvision's
ImageFolder with RandomResizedCrop, RandomHorizontalFlip, ToTensor and Normalize behind a DataLoader, and cadapt's
TrainLoader with its default preset. On one core, seconds are the process' own (user and system), so that other work on
the machine counts little; with workers, they are the clock's. The pictures are rendered: clouds of colour whose
spectrum falls as in photographs, shapes with sharp edges, and sensor noise that makes files as large as photographs'.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from cadapt.data import TrainLoader, find_images
from cadapt.preprocessing import Preprocessing
from tests.benchmarks.machine import describe_machine

BATCH, SIDE, CLASSES = 64, 224, 4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_JPEG: dict[str, Any] = {"quality": 90, "subsampling": "4:2:0"}

Batches = Iterator[Any]
Begin = Callable[[int], Batches]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Which files: how many of one size and kind, and how much noise (levels) to make them as large as photographs."""

    name: str
    size: tuple[int, int]
    suffix: str = "jpg"
    noise: float = 6.0
    options: tuple[str, ...] = ()


CASES = (
    Case(name="500x375 JPEG", size=(500, 375)),
    Case(name="500x375 JPEG, smooth", size=(500, 375), noise=3.0),
    Case(name="500x375 JPEG, progressive", size=(500, 375), options=("progressive",)),
    Case(name="1024x768 JPEG", size=(1024, 768)),
    Case(name="500x375 PNG", size=(500, 375), suffix="png"),
)


def render(generator: np.random.Generator, size: tuple[int, int], noise: float) -> Image.Image:
    """Return a picture of photographs' 1/f amplitudes, with shapes on it, and noise as a sensor adds it."""
    width, height = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1.0
    shades = _clouds(generator, frequency, 1.1, size)
    tints = [_clouds(generator, frequency, 1.6, size) for _ in range(2)]
    colours = np.stack([shades * 40 + 18 * tints[0], shades * 40 + 10 * tints[1], shades * 40 - 18 * tints[0]], axis=-1)
    image = Image.fromarray(np.clip(128 + colours, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for number in range(12):
        left, top = int(generator.integers(0, width)), int(generator.integers(0, height))
        extent = int(generator.integers(10, width // 4))
        colour = tuple(int(value) for value in generator.integers(0, 256, 3))
        box = (left, top, left + extent, top + extent)
        draw.ellipse(box, outline=colour, width=3) if number % 2 else draw.rectangle(box, fill=colour)
    noisy = np.asarray(image) + generator.normal(0, noise, (height, width, 1))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def _clouds(
    generator: np.random.Generator, frequency: npt.NDArray[np.float64], power: float, size: tuple[int, int]
) -> npt.NDArray[np.float64]:
    phases = np.exp(2j * np.pi * generator.random(frequency.shape))
    clouds: npt.NDArray[np.float64] = np.fft.irfft2(phases / frequency**power, s=size[::-1])
    return clouds / clouds.std()


def make_files(root: Path, case: Case, count: int) -> float:
    """Write the case's pictures into class folders; return their mean size in bytes."""
    generator = np.random.default_rng(0)
    sizes = []
    for number in range(count):
        path = root / f"class{number % CLASSES}" / f"{number:04d}.{case.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        options = _JPEG | dict.fromkeys(case.options, True) if case.suffix == "jpg" else {}
        render(generator, case.size, case.noise).save(path, **options)
        sizes.append(path.stat().st_size)
    return statistics.mean(sizes)


def contenders(root: Path, workers: int) -> dict[str, Begin]:
    """Return for each a function that begins an epoch."""
    steps = [transforms.RandomResizedCrop(SIDE), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    dataset = ImageFolder(str(root), transforms.Compose([*steps, transforms.Normalize(MEAN, STD)]))
    loader: DataLoader[Any] = DataLoader(
        dataset, BATCH, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )
    begin: dict[str, Begin] = {"torchvision": lambda _epoch: iter(loader)}
    for interpolation in ("bilinear", "bicubic"):  # torchvision's, and the one most of timm's models ask for
        preprocessing = Preprocessing(input_size=(3, SIDE, SIDE), interpolation=interpolation, mean=MEAN, std=STD)
        ours = TrainLoader(find_images(root), preprocessing, batch_size=BATCH, workers=workers, drop_last=True)
        begin[f"cadapt, {interpolation}"] = ours.batches
    return begin


def measure(begin: dict[str, Begin], epochs: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Return each contender's seconds per batch; entry i of each belongs to one round."""
    seconds: dict[str, list[float]] = {name: [] for name in begin}
    for epoch in range(-1, epochs):  # the first for warmth
        running = {name: start(max(epoch, 0)) for name, start in begin.items()}
        while True:
            round_ = {name: _timed(batches, clock) for name, batches in running.items()}
            if None in round_.values():
                break
            if epoch >= 0:
                for name, value in round_.items():
                    seconds[name].append(value or 0.0)
    return seconds


def measure_epochs(begin: dict[str, Begin], epochs: int) -> dict[str, list[float]]:
    """Return each contender's seconds per batch in whole epochs, one contender after the other: workers read ahead."""
    seconds: dict[str, list[float]] = {name: [] for name in begin}
    for epoch in range(-1, epochs):
        for name, start in begin.items():
            began = time.perf_counter()
            count = sum(1 for _ in start(max(epoch, 0)))
            if count == 0:
                sys.exit("no full batch of 64 in so few files: take more --images")
            if epoch >= 0:
                seconds[name].append((time.perf_counter() - began) / count)
    return seconds


def _timed(batches: Batches, clock: Callable[[], float]) -> float | None:
    began = clock()
    batch = next(batches, None)
    elapsed = clock() - began
    if batch is None:
        return None
    assert batch[0].shape == (BATCH, 3, SIDE, SIDE)
    assert batch[0].dtype == torch.float32
    return elapsed


def summarise(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Return images per second, and how many times torchvision's that is, by the median of the rounds' ratios."""
    baseline = seconds["torchvision"]
    return {
        name: {
            "images_per_second": BATCH / statistics.median(values),
            "ratio": statistics.median(a / b for a, b in zip(baseline, values, strict=True)),
            "ratio_of_fastest": min(baseline) / min(values),
            "seconds": values,
        }
        for name, values in seconds.items()
    }


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every case with every number of workers."""
    found = []
    for case in CASES:
        if options.cases and case.name not in options.cases:
            continue
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            mean_bytes = make_files(root, case, options.images)
            for workers in options.workers:
                begin = contenders(root, workers)
                in_process = workers == 0
                seconds = measure(begin, options.epochs, time.process_time) if in_process else None
                results = summarise(seconds or measure_epochs(begin, options.epochs))
                found.append({**asdict(case), "mean_bytes": mean_bytes, "workers": workers, "results": results})
                show(found[-1])
    return found


def show(result: dict[str, Any]) -> None:
    """Write one case's table to stderr."""
    print(f"{result['name']}, {result['mean_bytes'] / 1000:.0f} KB, {result['workers']} workers", file=sys.stderr)
    for name, figures in result["results"].items():
        speed, ratio, fastest = (figures[key] for key in ("images_per_second", "ratio", "ratio_of_fastest"))
        print(f"  {name:18} {speed:7.0f} images/s {ratio:5.2f} × (fastest: {fastest:.2f} ×)", file=sys.stderr)


def main() -> None:
    """Parse, measure, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=256, help="files of each case")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES])
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = {"machine": describe_machine("cpu", 1), "batch": BATCH, "side": SIDE, "cases": run(options)}
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
