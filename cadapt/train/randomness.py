"""Where a step's randomness comes from: (seed, epoch, step) alone, so that dropout, drop-path and mixup draw the same
numbers whether or not the run was interrupted before. The generators' states are saved besides, for loaders and
models of the caller's own that draw outside a step.
"""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch

from cadapt.data.seeding import derive_seed, seed_generators


def seed_step(seed: int, epoch: int, step: int) -> None:
    """Seed torch (all devices), numpy and Python for one optimizer step."""
    number = derive_seed("step", seed, epoch, step)
    seed_generators(number)
    # those are the CPU's; dropout on a GPU draws from the GPU's
    torch.manual_seed(number)


def random_state() -> dict[str, Any]:
    """Return the states of all global generators, as values that ``torch.load(weights_only=True)`` reads."""
    algorithm, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": (str(algorithm), [int(key) for key in keys], int(position), int(has_gauss), float(gauss)),
        "python": random.getstate(),
    }
    # a run on the CPU of a machine with GPUs must not wake them up for this
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Put all global generators into a state that :func:`random_state` returned, as far as this machine has them."""
    torch.set_rng_state(state["torch"])
    algorithm, keys, *rest = state["numpy"]
    numpy.random.set_state((algorithm, numpy.array(keys, dtype=numpy.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
