"""What a training step keeps between its forward and its backward pass, counted on real tensors.

Two counts meet. Autograd's hooks see every tensor that an operator saves, and show distinct storages; what is kept
behind their back (activation checkpointing keeps its inputs, a custom function attributes on its context) is found
among the storages made during the forward pass that are still alive after it. Parameters and buffers are left out.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True, kw_only=True)
class SavedBytes:
    """Bytes kept: ``hooked`` what autograd's hooks see, ``hidden`` what else was made and lives on, None if unknown."""

    hooked: int
    hidden: int | None

    @property
    def total(self) -> int:
        """All that is known to be kept."""
        return self.hooked + (self.hidden or 0)


class _Kept:
    """Stands for one saved tensor; it lives as long as the graph node that saved it."""

    def __init__(self, tensor: Tensor) -> None:
        # not the tensor: a node that kept its own output through us would never be freed
        self.storage = tensor.untyped_storage()


class _Births(TorchDispatchMode):
    """Remembers, weakly, every storage that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                # the weak reference holds the address, so that no later storage can take it
                self.storages.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        return result

    def alive(self) -> dict[int, int]:
        """Bytes of the storages that still live, by identity."""
        return {key: size for key, (reference, size) in self.storages.items() if not reference.expired()}


def count_saved_bytes(
    forward: Callable[[], Tensor], modules: Iterable[nn.Module], *, see_hidden: bool = True
) -> SavedBytes:
    """Run ``forward`` once and count what lives until a backward pass from the tensor it returns.

    Args:
        forward: makes the loss; run it once before, so that caches which outlive a step exist already.
        modules: whose parameters and buffers are not counted.
        see_hidden: whether to look beyond the hooks, which a compiled model does not bear.
    """
    references: list[weakref.ref[_Kept]] = []

    def pack(tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        references.append(weakref.ref(kept))
        return kept

    births = _Births() if see_hidden else None
    with births or nullcontext(), saved_tensors_hooks(pack, _never_read):
        loss = forward()
    gc.collect()
    own = {
        tensor.untyped_storage()._cdata
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
    }  # fmt: skip
    alive = [kept.storage for reference in references if (kept := reference()) is not None]
    hooked = {storage._cdata: storage.nbytes() for storage in alive if storage._cdata not in own}
    hidden = None
    if births is not None:
        seen = own | set(hooked) | {loss.untyped_storage()._cdata}
        hidden = sum(size for key, size in births.alive().items() if key not in seen)
    del loss, alive
    return SavedBytes(hooked=sum(hooked.values()), hidden=hidden)


def _never_read(kept: _Kept) -> Tensor:
    raise AssertionError(f"nothing runs backward while counting, yet {kept} was asked for")
