"""The adapter file: one safetensors file with all that a task needs beside its base.

Every trained tensor, and in the metadata the plan, the class names, the preprocessing and the training record. Equal
bundles give equal bytes. Torch is imported only where tensors are at hand, so that a header is read in no time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from cadapt.bundle.container import ITEM_BYTES, Entry, lay_out, pack_header
from cadapt.bundle.header import (
    DIGEST_KEY,
    FORMAT_VERSION,
    RECORD_KEY,
    Header,
    TensorInfo,
    describe,
    digest,
    pack_record,
    read_container,
    read_header,
    read_stream,
)
from cadapt.errors import CadaptError, RefusedError
from cadapt.files import write_atomically
from cadapt.hashing import tensor_bytes
from cadapt.plan import Json, Plan
from cadapt.preprocessing import Preprocessing
from cadapt.version import __version__

if TYPE_CHECKING:
    import torch

__all__ = [
    "FORMAT_VERSION",
    "Bundle",
    "Header",
    "TensorInfo",
    "bundle_bytes",
    "load_bundle",
    "read_header",
    "save_bundle",
]

_TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
assert _TORCH_NAMES.keys() == ITEM_BYTES.keys()


@dataclass(frozen=True, kw_only=True, eq=False)
class Bundle:
    """What an adapter file holds. ``training`` is a free record of JSON values; tensors are on the CPU when loaded.

    Two bundles are compared by their :func:`bundle_bytes`, since tensors have no single truth value.
    """

    plan: Plan
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    training: Mapping[str, Json]
    tensors: Mapping[str, torch.Tensor]


def save_bundle(path: str | Path, bundle: Bundle, *, overwrite: bool) -> None:
    """Write an adapter file, whole or not at all.

    Strides, devices and shared storage are not kept: each tensor is written in full, in row-major order. Values of
    ``training`` that JSON cannot say (NaN, infinities) are written as null.

    Raises:
        UsageError: the file exists and ``overwrite`` is false.
        CadaptError: the system refused, or a tensor's kind cannot be stored.
    """
    header, parts = _pack(bundle)

    def write(handle: BinaryIO) -> None:
        handle.write(header)
        for part in parts:
            handle.write(part)

    write_atomically(path, write, overwrite=overwrite)


def bundle_bytes(bundle: Bundle) -> bytes:
    """Return the bytes of the file that :func:`save_bundle` writes.

    Raises:
        CadaptError: a tensor's kind cannot be stored.
    """
    header, parts = _pack(bundle)
    return b"".join([header, *parts])


def load_bundle(source: str | Path | bytes) -> Bundle:
    """Read an adapter file, and refuse it unless every byte that matters is as it was saved.

    Args:
        source: the file, or its bytes.

    Raises:
        RefusedError: it is no adapter file, damaged, cut short, or of a later format.
        CadaptError: it cannot be read.
    """
    where = describe(source)
    content = source if isinstance(source, bytes) else _read(Path(source))
    header, container = read_container(content, where)
    view = memoryview(content)[container.data_start :]
    tensors: dict[str, torch.Tensor] = {}
    for name, info in header.tensors.items():
        entry = container.entries[name]
        part = view[entry.begin : entry.end]
        if hashlib.sha256(part).hexdigest() != info.sha256:
            raise RefusedError(f"{where}: damaged: tensor '{name:.80}' is not what was saved (SHA-256 differs)")
        tensors[name] = _read_tensor(name, entry, part)
    return Bundle(
        plan=header.plan,
        classes=header.classes,
        preprocessing=header.preprocessing,
        training=header.training,
        tensors=tensors,
    )


def _read(path: Path) -> bytes:
    # tells a foreign file of gigabytes by its header, before it is read
    if path.is_file():
        read_header(path)
    try:
        with path.open("rb") as handle:
            return handle.read() if path.is_file() else read_stream(handle)
    except OSError as error:
        raise CadaptError(f"cannot read '{path}': {error.strerror or error}") from error
    except RefusedError as error:
        raise RefusedError(f"'{path}': {error.message}", hint=error.hint) from error


def _pack(bundle: Bundle) -> tuple[bytes, list[memoryview]]:
    """The file's header, and the tensors' bytes in the order of the file."""
    kinds = {name: (_dtype(name, tensor), tuple(tensor.shape)) for name, tensor in bundle.tensors.items()}
    entries = lay_out(kinds)
    parts = {name: tensor_bytes(name, bundle.tensors[name]) for name in entries}
    record = pack_record(
        plan=bundle.plan,
        classes=bundle.classes,
        preprocessing=bundle.preprocessing,
        training=bundle.training,
        sha256={name: hashlib.sha256(part).hexdigest() for name, part in parts.items()},
        cadapt_version=__version__,
    )
    metadata = {"format": "pt", RECORD_KEY: record, DIGEST_KEY: digest(record, entries)}
    return pack_header(entries, metadata), list(parts.values())


def _dtype(name: str, tensor: torch.Tensor) -> str:
    if name == "__metadata__":
        raise CadaptError("a tensor cannot be named '__metadata__': the file format keeps that name for itself")
    wanted = str(tensor.dtype).removeprefix("torch.")
    for dtype, torch_name in _TORCH_NAMES.items():
        if torch_name == wanted:
            return dtype
    raise CadaptError(f"tensor '{name}' is {wanted}, which an adapter file cannot hold")


def _read_tensor(name: str, entry: Entry, part: memoryview) -> torch.Tensor:
    import torch

    dtype = getattr(torch, _TORCH_NAMES[entry.dtype], None)
    if dtype is None:
        raise CadaptError(f"tensor '{name}' is {entry.dtype}, which torch {torch.__version__} does not know")
    if not part.nbytes:
        return torch.empty(entry.shape, dtype=dtype)
    # a copy of its own: writable, aligned, and not keeping the whole file in memory
    return torch.frombuffer(bytearray(part), dtype=dtype).reshape(entry.shape)
