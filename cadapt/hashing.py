"""The identity of tensors: what makes a base *this* base, and a tensor in an adapter file the one that was saved.

Kept apart from the adapter file because loading a backbone needs it too. Torch is imported only when a tensor is
at hand, so that whoever merely reads headers does not pay for it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from cadapt.errors import CadaptError

if TYPE_CHECKING:
    import torch


def tensor_bytes(name: str, tensor: torch.Tensor) -> memoryview:
    """Return a tensor's bytes in row-major order, whatever its strides and device.

    No copy is made of a contiguous tensor in the computer's memory: the view is valid while the tensor lives, and
    changes with it.

    Args:
        name: what the error calls the tensor.
        tensor: any shape and dtype.

    Raises:
        CadaptError: the tensor has no bytes of that kind (meta device, sparse or quantised).
    """
    import torch

    plain = tensor.detach()
    if plain.is_meta or plain.layout != torch.strided or plain.is_quantized:
        kind = "on the meta device" if plain.is_meta else "sparse or quantised"
        raise CadaptError(f"tensor '{name}' has no plain data: it is {kind}")
    dense = plain.resolve_conj().resolve_neg().cpu().contiguous()
    return dense.reshape(-1).view(torch.uint8).numpy().data


def hash_tensors(items: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the SHA-256 over the name, dtype, shape and bytes of each tensor, in the order of their names.

    Strides, device and ``requires_grad`` do not count.

    >>> import torch
    >>> weight = torch.arange(6.0).reshape(2, 3)
    >>> hash_tensors([("a", weight), ("b", weight)]) == hash_tensors([("b", weight.clone()), ("a", weight)])
    True

    Raises:
        CadaptError: a tensor has no plain data.
        ValueError: two tensors have the same name.
    """
    digest = hashlib.sha256()
    previous: str | None = None
    for name, tensor in sorted(items, key=lambda item: item[0]):
        if name == previous:
            raise ValueError(f"two tensors are named '{name}'")
        previous = name
        dtype = str(tensor.dtype).removeprefix("torch.")
        # as JSON, so that no name can run into the dtype or the shape behind it
        digest.update(json.dumps([name, dtype, list(tensor.shape)]).encode())
        digest.update(tensor_bytes(name, tensor))
    return digest.hexdigest()
