"""What a benchmark ran on: enough to read its figures by, nothing that tells whose machine it was."""

from __future__ import annotations

import importlib.util
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def describe_machine(device: str, threads: int) -> dict[str, Any]:
    """Return processor, accelerator, threads and the versions of what takes part."""
    packages = ("torch", "timm", "peft", "cadapt")
    return {
        "processor": _processor(),
        "accelerator": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "threads": threads,
        "python": platform.python_version(),
        "system": platform.system(),
        "versions": {name: version(name) if _installed(name) else None for name in packages},
    }


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _processor() -> str:
    table = Path("/proc/cpuinfo")
    if table.exists():
        for line in table.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
