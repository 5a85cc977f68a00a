"""A stretch of code under its own seed, after which the caller's random numbers go on as if nothing had been drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cadapt.errors import UsageError

LARGEST_SEED = 2**63 - 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator inside and put its state back after; no other device's generator is touched.

    Raises:
        UsageError: the seed is negative or over 2**63 - 1.
    """
    if not 0 <= seed <= LARGEST_SEED:
        raise UsageError(f"seed is {seed}, expected 0 to 2**63 - 1", hint="--seed 0")
    state = torch.get_rng_state()
    # torch.manual_seed would seed every GPU's generator as well, and not give it back
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
