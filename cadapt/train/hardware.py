"""What ``auto`` means on this machine: the device a run uses, and the precision of its forward passes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from cadapt.errors import UsageError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """Return the device of a name; ``auto`` is cuda, else mps, else cpu.

    Raises:
        UsageError: torch knows no such device, or this machine has none.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}", hint="use auto, cpu, mps, cuda or cuda:0") from error
    missing = (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise UsageError(f"this machine has no device {name!r}", hint="use --device auto")
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """Return fp32, bf16 or fp16; ``auto`` is bf16 on a GPU that computes in it, and fp32 elsewhere.

    A CPU's bf16 is never chosen by itself: only some have units for it, and a run should not depend on which.

    Raises:
        UsageError: fp16 without a cuda device, where no loss scaling is at hand.
    """
    if name == "auto":
        on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if on_gpu else "fp32"
    if name == "fp16" and device.type != "cuda":
        raise UsageError(f"precision fp16 needs a cuda device, got {device.type}", hint="use --precision bf16 or fp32")
    return name


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which forward passes run."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])
