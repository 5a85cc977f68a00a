"""The safetensors container, read and laid out without torch: names, dtypes, shapes and offsets, and nothing else.

The safetensors package is not used here: it imports torch to say what a file holds, writes no deterministic
metadata, and reports damage without saying what is damaged. The files are ordinary safetensors all the same.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cadapt.errors import RefusedError

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 64

ITEM_BYTES: Mapping[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "F8_E8M0": 1,
    "C64": 8,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a container: its safetensors dtype, its shape, and its bytes' place behind the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Container:
    """What a safetensors header says; ``data_start`` is the offset of the first tensor's byte in the file."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data_start: int


def lay_out(kinds: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Entry]:
    """Return each tensor's place, in the order of the file: larger items first, so that all are aligned, then by name.

    Args:
        kinds: the safetensors dtype and the shape of each tensor.
    """
    entries: dict[str, Entry] = {}
    offset = 0
    for name in sorted(kinds, key=lambda name: (-ITEM_BYTES[kinds[name][0]], name)):
        dtype, shape = kinds[name]
        end = offset + ITEM_BYTES[dtype] * math.prod(shape)
        entries[name] = Entry(dtype=dtype, shape=shape, begin=offset, end=end)
        offset = end
    return entries


def pack_header(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """Return the bytes before the tensors: the length, the JSON, and spaces up to a multiple of eight."""
    record: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    for name, entry in entries.items():
        record[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [entry.begin, entry.end]}
    header = json.dumps(record, separators=(",", ":")).encode()
    header += b" " * (-len(header) % LENGTH_BYTES)
    return struct.pack("<Q", len(header)) + header


def check_length(start: bytes, file_bytes: int) -> int:
    """Return the header's length from a file's first nine bytes, believing nothing that the file's size denies.

    Raises:
        RefusedError: this is no safetensors file, or not a whole one.
    """
    if file_bytes == 0:
        raise RefusedError("the file is empty")
    if len(start) <= LENGTH_BYTES:
        raise RefusedError(f"not a safetensors file, or cut short: it has only {file_bytes} bytes")
    if start[LENGTH_BYTES : LENGTH_BYTES + 1] != b"{":
        pickled = start[:2] in (b"PK", b"\x80\x02")
        raise RefusedError("not a safetensors file" + (" but a pickled PyTorch checkpoint" if pickled else ""))
    (length,) = struct.unpack("<Q", start[:LENGTH_BYTES])
    if length > MAX_HEADER_BYTES:
        raise RefusedError(f"damaged: its header claims {length} bytes, at most {MAX_HEADER_BYTES} are allowed")
    if length > file_bytes - LENGTH_BYTES:
        raise RefusedError(f"cut short: a header of {length} bytes, but only {file_bytes - LENGTH_BYTES} follow")
    return int(length)


def parse_header(header: bytes, file_bytes: int) -> Container:
    """Read the JSON between the length and the tensors, holding it against the file's size.

    Raises:
        RefusedError: it is not what the format demands: JSON without duplicate keys, tensors that follow each
            other without a gap up to the end of the file, each as long as its dtype and shape say.
    """
    record = parse_object(header, "header")
    metadata = record.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise RefusedError("damaged: its metadata is not text by text")
    entries = {name: _read_entry(name, value) for name, value in record.items()}
    _check_offsets(entries, file_bytes - LENGTH_BYTES - len(header))
    return Container(entries=entries, metadata=metadata, data_start=LENGTH_BYTES + len(header))


def parse_object(text: bytes | str, what: str) -> dict[str, Any]:
    """Parse a JSON object from an untrusted file.

    Raises:
        RefusedError: it is no JSON object, names a key twice, or holds a NaN or an infinity.
    """
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        record = json.loads(decoded, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"damaged: its {what} is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise RefusedError(f"damaged: its {what} is {type(record).__name__}, expected an object")
    return record


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a key is there twice")
    return record


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no JSON number")
    return value


def _read_entry(name: str, value: object) -> Entry:
    record = value if isinstance(value, dict) else {}
    dtype, shape, offsets = record.get("dtype"), _sizes(record.get("shape")), _sizes(record.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise RefusedError(f"damaged: tensor {name!r:.80} has dtype {dtype!r:.20}, expected one of safetensors' kinds")
    if shape is None or offsets is None or len(offsets) != 2:
        raise RefusedError(f"damaged: tensor {name!r:.80} has no shape or no offsets, got {value!r:.80}")
    needed = ITEM_BYTES[dtype] * math.prod(shape)
    if offsets[1] - offsets[0] != needed:
        raise RefusedError(f"damaged: tensor {name!r:.80} has {offsets[1] - offsets[0]} bytes, expected {needed!s:.20}")
    return Entry(dtype=dtype, shape=shape, begin=offsets[0], end=offsets[1])


def _sizes(values: object) -> tuple[int, ...] | None:
    """A list of sizes as a tuple, or None if it is anything else."""
    # type(), because JSON's true is an int to isinstance; the bounds keep the product of the sizes cheap
    if isinstance(values, list) and len(values) <= MAX_DIMENSIONS:
        return tuple(values) if all(type(value) is int and 0 <= value < 2**63 for value in values) else None
    return None


def _check_offsets(entries: Mapping[str, Entry], data_bytes: int) -> None:
    expected = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != expected:
            raise RefusedError(f"damaged: tensor {name!r:.80} begins at {entry.begin}, expected {expected}")
        expected = entry.end
    if expected > data_bytes:
        raise RefusedError(f"cut short: its tensors need {expected} bytes, got {data_bytes}")
    if expected < data_bytes:
        raise RefusedError(f"damaged: {data_bytes - expected} bytes follow its last tensor")
