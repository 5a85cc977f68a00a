"""Gives batches their memory: used again once nobody holds the batch that lay in it, or shared with the main process.

To be given tens of megabytes afresh for every batch, and to have them cleared first, takes longer than writing the
pixels does. The loaders' :class:`~cadapt.data.workers.Samples` keep one :class:`BatchMemory` each.
"""

from __future__ import annotations

import weakref
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import get_worker_info

_KEPT = 3  # the consumer's, the one being filled, and one for consumers that look back
_Floats = npt.NDArray[np.float32]


class BatchMemory:
    """Hands out float32 tensors of uninitialised memory."""

    def __init__(self) -> None:
        # Each array, and the view of it that the last tensor on it was made of. Torch keeps that view alive for as
        # long as this tensor or any view of it lives, wherever.
        self._arrays: list[tuple[_Floats, weakref.ref[_Floats]]] = []

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a contiguous tensor of that shape; in a loader's worker, one that the main process can share.

        Memory that was handed out before comes again only when every tensor on it is gone.
        """
        if get_worker_info() is not None:
            return _shared(shape)
        free = [pair for pair in self._arrays if pair[1]() is None]
        taken = [pair for pair in self._arrays if pair[1]() is not None]
        # numpy asks Linux for large pages where it can, torch does not
        array = next((array for array, _ in free if array.shape == shape), None)
        array = np.empty(shape, dtype=np.float32) if array is None else array
        view = array.view()
        others = [pair for pair in (*free, *taken) if pair[0] is not array]
        self._arrays = [*others, (array, weakref.ref(view))][-_KEPT:]
        return torch.from_numpy(view)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to a worker empty."""
        return (BatchMemory, ())


def _shared(shape: tuple[int, ...]) -> torch.Tensor:
    # As torch's own collate does it: no public way makes shared memory without copying something into it.
    storage = torch.UntypedStorage._new_shared(4 * prod(shape), device="cpu")  # type: ignore[no-untyped-call]
    flat: torch.Tensor = torch.empty(0, dtype=torch.float32).set_(storage)
    return flat.view(shape)
