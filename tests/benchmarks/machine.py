"""The machine of a benchmark: what to set on it, and enough about it to read the figures by, but not whose it is."""

from __future__ import annotations

import importlib.util
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import cadapt


def describe_machine(device: str, threads: int) -> dict[str, Any]:
    """Return processor, accelerator, threads and the versions of what takes part."""
    packages = ("torch", "timm", "peft")
    return {
        "processor": _processor(),
        "accelerator": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "threads": threads,
        "python": platform.python_version(),
        "system": platform.system(),
        # cadapt may run from a copy of its tree, which no installer knows
        "versions": {
            **{name: version(name) if _installed(name) else None for name in packages},
            "cadapt": cadapt.__version__,
        },
    }


def set_up(device: str) -> None:
    """Set for all contenders what timm's training script sets for itself on a GPU."""
    if device.startswith("cuda"):
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = True


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _processor() -> str:
    table = Path("/proc/cpuinfo")
    if table.exists():
        for line in table.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
