"""What ``auto`` means on this machine: the device a run uses, and the precision of its forward passes.

The engine and ``cadapt eval`` choose by it; the autocast context itself is :func:`cadapt.evaluation.autocast`.
"""

from __future__ import annotations

import torch

from cadapt.errors import UsageError

_DEVICES_HINT = "use auto, cpu, mps, cuda or cuda:0"


def resolve_device(name: str) -> torch.device:
    """Return the device of a name; ``auto`` is cuda, else mps, else cpu.

    Raises:
        UsageError: it is none of cpu, cuda and mps, with or without an index, or this machine has none such.
    """
    on_mps = torch.backends.mps.is_available()
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if on_mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}", hint=_DEVICES_HINT) from error
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(on_mps)}
    if device.type not in counts:
        raise UsageError(f"device {name!r} is not supported, expected cpu, cuda or mps", hint=_DEVICES_HINT)
    if (device.index or 0) >= counts[device.type]:
        raise UsageError(f"this machine has no device {name!r}", hint="use --device auto")
    return device


def describe_device(device: torch.device) -> str:
    """Return what a device's rounding goes by: its kind, and for a GPU its model, but not its index."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def resolve_precision(name: str, device: torch.device) -> str:
    """Return fp32, bf16 or fp16; ``auto`` is bf16 on a GPU that computes in it, and fp32 elsewhere.

    A CPU's bf16 is never chosen by itself: only some have units for it, and a run should not depend on which.

    Raises:
        UsageError: fp16 without a cuda device, where no loss scaling is at hand.
    """
    if name == "auto":
        return "bf16" if device.type == "cuda" and _computes_bf16(device) else "fp32"
    if name == "fp16" and device.type != "cuda":
        raise UsageError(f"precision fp16 needs a cuda device, got {device.type}", hint="use --precision bf16 or fp32")
    return name


def _computes_bf16(device: torch.device) -> bool:
    # torch answers for the current device, which need not be the one asked for
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
