"""How many bytes of main memory a process may still take: what the system has free, and what its cgroup allows.

Only the standard library is used; where a system does not tell, the answer is None. Linux: ``/proc/meminfo``, and the
memory controllers of cgroups v1 and v2 (a container's limit); macOS: ``sysctl``; Windows: ``GlobalMemoryStatusEx``.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import sys
from collections.abc import Iterator
from pathlib import Path

# cgroup v1 writes the largest multiple of a page for "no limit"
_NO_LIMIT = 1 << 60


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes of main memory that this process may still take without swapping, or None where unknown.

    Args:
        root: the folder under which a Linux system's ``proc`` and ``sys`` are.
    """
    if sys.platform == "win32":
        return _windows()
    if sys.platform == "darwin":
        return _macos()
    return linux_memory(root)


def linux_memory(root: Path) -> int | None:
    """Return the least of the system's ``MemAvailable`` and of what each cgroup above this process leaves."""
    found = [value for value in (_mem_available(root), *_cgroups(root)) if value is not None]
    return min(found, default=None)


def _mem_available(root: Path) -> int | None:
    for line in _lines(root / "proc/meminfo"):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _cgroups(root: Path) -> Iterator[int | None]:
    """What each cgroup of this process leaves, from its own up to the root's; a container sees only some of them."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, place = line.split(":", 2)
        if controllers == "":
            names = ("memory.max", "memory.current", "inactive_file")
            yield from _up(root / "sys/fs/cgroup", place, names)
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _up(root / "sys/fs/cgroup/memory", place, names)


def _up(mount: Path, place: str, names: tuple[str, str, str]) -> Iterator[int | None]:
    below = [part for part in place.split("/") if part not in ("", "..")]
    for depth in range(len(below), -1, -1):
        yield _left(mount.joinpath(*below[:depth]), *names)


def _left(folder: Path, limit_name: str, used_name: str, cached_name: str) -> int | None:
    limit, used = _number(folder / limit_name), _number(folder / used_name)
    if limit is None or used is None or limit >= _NO_LIMIT:
        return None
    figures = dict(line.split() for line in _lines(folder / "memory.stat"))
    # pages of files that nobody used lately are counted as used, and given up before memory runs out
    return max(0, limit - used + int(figures.get(cached_name, 0)))


def _number(path: Path) -> int | None:
    text = "".join(_lines(path))
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    # not every system has every file, and a cgroup's may be out of reach: then it says nothing
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []


def _macos() -> int | None:
    counts = [_sysctl(name) for name in ("vm.page_free_count", "vm.page_pageable_external_count",
                                         "vm.page_purgeable_count")]  # fmt: skip
    size = _sysctl("hw.pagesize")
    known = [count for count in counts if count is not None]
    return sum(known) * size if size and len(known) == len(counts) else None


def _sysctl(name: str) -> int | None:
    library = ctypes.CDLL(ctypes.util.find_library("c"))
    value, size = ctypes.c_uint64(0), ctypes.c_size_t(8)
    failed = library.sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0)
    return None if failed else int(value.value)


class _MemoryStatus(ctypes.Structure):
    """Windows' MEMORYSTATUSEX."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in (
            "total", "available", "total_page_file", "available_page_file", "total_virtual", "available_virtual",
            "available_extended_virtual",
        )),
    )  # fmt: skip


def _windows() -> int | None:
    if sys.platform != "win32":
        return None
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    told = ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return int(status.available) if told else None
