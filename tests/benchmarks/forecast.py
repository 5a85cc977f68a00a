"""The forecast of a run's memory against what a step takes on a CPU under Linux: growth of a process's resident set.

    python -m tests.benchmarks.forecast --models resnet50 convnext_tiny --batch 8 --output forecast.json

Each case runs in a fresh process, whose libraries' own memory is there before the step begins: a step of one picture
comes first. ``share`` is the forecast's part of what was measured; what lacks is kernels' own and the allocator's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import timm
import torch
from torch import nn

import cadapt
from cadapt.costing import measure_step
from cadapt.evaluation import autocast
from cadapt.frozen import prepare


def model_of(case: list[str]) -> nn.Module:
    """The model that a case trains: plain, or prepared."""
    name, scheme, engine, precision = case
    adapted = cadapt.insert(timm.create_model(name), scheme, num_classes=10).to(memory_format=torch.channels_last)
    return adapted.train() if engine == "plain" else prepare(adapted.train(), memory=engine, precision=precision)


def take_step(model: nn.Module, batch: int, precision: str) -> None:
    images = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    with autocast(precision, torch.device("cpu")):
        logits = model(images)
    del images
    logits.float().sum().backward()
    model.zero_grad(set_to_none=True)


def measure(case: list[str], batch: int) -> dict[str, object]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, precision = model_of(case), case[-1]
    step = measure_step(model, batch=batch, precision=precision, channels_last=True)
    take_step(model, 1, precision)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far, which making the model set, is forgotten
    take_step(model, batch, precision)
    grown = resident("VmHWM") - before
    return {"case": case, "batch": batch, "activations": step.activations, "foretold": step.highest, "grown": grown,
            "share": step.highest / max(1, grown)}  # fmt: skip


def resident(name: str) -> int:
    """Bytes of the resident set: now (``VmRSS``), or at its highest (``VmHWM``)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["resnet50", "convnext_tiny"])
    parser.add_argument("--scheme", default="conv-par")
    parser.add_argument("--precisions", nargs="+", default=["fp32"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case, options.batch)))
        return
    found = []
    for case in ([name, options.scheme, engine, precision] for name in options.models
                 for precision in options.precisions for engine in ("plain", "low", "min")):  # fmt: skip
        command = [sys.executable, "-m", "tests.benchmarks.forecast", "--batch", str(options.batch), "--case", *case]
        found.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
        print(found[-1], file=sys.stderr)
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
