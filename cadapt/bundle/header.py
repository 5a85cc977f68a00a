"""What an adapter file says about itself: read, checked and printed without touching torch or the tensors' bytes.

Two digests guard it: one over the record and the tensors' names, dtypes and shapes, checked here, and one for each
tensor's bytes, checked when they are loaded.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cadapt.bundle.container import LENGTH_BYTES, Container, Entry, check_length, parse_header, parse_object
from cadapt.errors import CadaptError, RefusedError
from cadapt.plan import Json, Plan
from cadapt.preprocessing import Preprocessing

FORMAT_VERSION = 1
RECORD_KEY = "cadapt"
DIGEST_KEY = "cadapt_sha256"

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """A tensor in the file: its dtype in safetensors' words, its shape, its size, the SHA-256 of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """All of an adapter file but the tensors themselves; ``training`` is a free record."""

    plan: Plan
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    training: Mapping[str, Json]
    tensors: Mapping[str, TensorInfo]
    format_version: int
    cadapt_version: str
    file_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object with all of it."""
        return {
            "format_version": self.format_version,
            "cadapt_version": self.cadapt_version,
            "file_bytes": self.file_bytes,
            "plan": self.plan.to_json(),
            "classes": list(self.classes),
            "preprocessing": self.preprocessing.to_json(),
            "training": dict(self.training),
            "tensors": {name: asdict(info) for name, info in self.tensors.items()},
        }


def read_header(source: str | Path | bytes) -> Header:
    """Read what an adapter file says about itself, without loading torch or the tensors.

    The tensors' bytes are not checked here; :func:`cadapt.bundle.load_bundle` does.

    Args:
        source: the file, or its bytes.

    Raises:
        RefusedError: it is no adapter file, damaged, cut short, or of a later format.
        CadaptError: it cannot be read.
    """
    return read_container(source)[0]


def read_container(source: str | Path | bytes, where: str | None = None) -> tuple[Header, Container]:
    """Read a header as :func:`read_header` does, with the places of the tensors; ``where`` is for the errors."""
    where = where or describe(source)
    try:
        header, file_bytes = _split(source)
        container = parse_header(header, file_bytes)
        return _read_record(container, file_bytes, where), container
    except OSError as error:
        raise CadaptError(f"cannot read '{source!s:.200}': {error.strerror or error}") from error
    except RefusedError as error:
        raise RefusedError(f"{where}: {error.message}", hint=error.hint) from error


def describe(source: str | Path | bytes) -> str:
    """Return what errors call the file."""
    return "adapter file from memory" if isinstance(source, bytes) else f"'{source}'"


def digest(record: str, entries: Mapping[str, Entry]) -> str:
    """Return the SHA-256 over the record's text and the tensors' names, dtypes and shapes."""
    kinds = {name: [entry.dtype, list(entry.shape)] for name, entry in entries.items()}
    return hashlib.sha256(json.dumps([record, kinds], sort_keys=True).encode()).hexdigest()


def pack_record(
    *,
    plan: Plan,
    classes: tuple[str, ...],
    preprocessing: Preprocessing,
    training: Mapping[str, Json],
    sha256: Mapping[str, str],
    cadapt_version: str,
) -> str:
    """Return the record as text, the same for the same values; a NaN or an infinity in ``training`` becomes null.

    Raises:
        ValueError, TypeError: a value is not JSON, or a plan's setting is not finite.
    """
    record = {
        "format_version": FORMAT_VERSION,
        "cadapt_version": cadapt_version,
        "base": plan.to_json()["base"],
        "plan": plan.to_json(),
        "classes": list(classes),
        "preprocessing": preprocessing.to_json(),
        "bn_policy": plan.bn_policy,
        "training": _finite(training),
        "tensors": dict(sha256),
    }
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _finite(value: Json) -> Json:
    """Replace what JSON cannot say, as a diverged run's loss, by null: a string would surprise who reads numbers."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _split(source: str | Path | bytes) -> tuple[bytes, int]:
    """The header's JSON and the file's size; of a file on disk only the header is read."""
    if not isinstance(source, bytes):
        path = Path(source)
        with path.open("rb") as handle:
            # a pipe has no size to hold the claimed length against
            if path.is_file():
                file_bytes = path.stat().st_size
                length = check_length(handle.read(LENGTH_BYTES + 1), file_bytes)
                handle.seek(LENGTH_BYTES)
                return handle.read(length), file_bytes
            source = read_stream(handle)
    length = check_length(source[: LENGTH_BYTES + 1], len(source))
    return source[LENGTH_BYTES : LENGTH_BYTES + length], len(source)


def read_stream(handle: BinaryIO) -> bytes:
    """Read a pipe or a device to its end, unless its first bytes show already that it is no safetensors file."""
    start = handle.read(LENGTH_BYTES + 1)
    check_length(start, sys.maxsize if len(start) > LENGTH_BYTES else len(start))
    return start + handle.read()


def _read_record(container: Container, file_bytes: int, where: str) -> Header:
    text = container.metadata.get(RECORD_KEY)
    if text is None:
        hint = f"look at it: cadapt inspect {where}" if where.startswith("'") else None
        raise RefusedError("a safetensors file, but no adapter file of cadapt", hint=hint)
    record = parse_object(text, "record")
    version = record.get("format_version")
    if type(version) is not int or version < 1:
        raise RefusedError(f"damaged: format version {version!r:.20}, expected {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        message = f"format version {version} is later than the {FORMAT_VERSION} known here"
        raise RefusedError(message, hint="upgrade cadapt: pip install -U cadapt")
    # after the version, since a later one may guard its header in another way
    if container.metadata.get(DIGEST_KEY) != digest(text, container.entries):
        raise RefusedError("damaged: its header is not what was saved (SHA-256 differs)")
    plan = Plan.from_json(_member(record, "plan", dict))
    if record.get("base") != record["plan"].get("base") or record.get("bn_policy") != plan.bn_policy:
        raise RefusedError("damaged: its record contradicts its plan about the base or the BN policy")
    return Header(
        plan=plan,
        classes=_read_classes(record),
        preprocessing=Preprocessing.from_json(_member(record, "preprocessing", dict)),
        training=_member(record, "training", dict),
        tensors=_read_tensors(_member(record, "tensors", dict), container.entries),
        format_version=version,
        cadapt_version=_member(record, "cadapt_version", str),
        file_bytes=file_bytes,
    )


def _member(record: Mapping[str, Any], key: str, kind: type) -> Any:
    value = record.get(key)
    if not isinstance(value, kind):
        raise RefusedError(f"damaged: {key} is {value!r:.60}, expected {kind.__name__}")
    return value


def _read_classes(record: Mapping[str, Any]) -> tuple[str, ...]:
    classes = _member(record, "classes", list)
    if not all(isinstance(name, str) for name in classes):
        raise RefusedError(f"damaged: classes are {classes!r:.60}, expected names")
    return tuple(classes)


def _read_tensors(sha256: Mapping[str, Any], entries: Mapping[str, Entry]) -> dict[str, TensorInfo]:
    missing, extra = sorted(set(sha256) - set(entries)), sorted(set(entries) - set(sha256))
    if missing:
        raise RefusedError(f"damaged: tensor {missing[0]!r:.80} is missing ({len(missing)} in all)")
    if extra:
        raise RefusedError(f"damaged: tensor {extra[0]!r:.80} is not in its record ({len(extra)} in all)")
    tensors: dict[str, TensorInfo] = {}
    for name in sorted(entries):
        entry, saved = entries[name], sha256[name]
        if not isinstance(saved, str) or not _SHA256.fullmatch(saved):
            raise RefusedError(f"damaged: the SHA-256 of tensor {name!r:.80} is {saved!r:.20}")
        size = entry.end - entry.begin
        tensors[name] = TensorInfo(dtype=entry.dtype, shape=entry.shape, sha256=saved, bytes=size)
    return tensors
