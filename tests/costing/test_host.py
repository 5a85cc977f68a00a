"""Free main memory, read from files laid out as Linux lays them out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cadapt.costing.host import available_memory, linux_memory

MIB = 2**20


def lay(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": f"MemTotal: 4096 kB\nMemAvailable:   {1024 * 1024} kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_a_limit(tmp_path: Path) -> None:
    assert linux_memory(lay(tmp_path, {})) == 1024 * MIB


def test_an_unknown_system(tmp_path: Path) -> None:
    assert linux_memory(tmp_path) is None


def version_2(limit: str, place: str = "") -> dict[str, str]:
    folder = f"sys/fs/cgroup{place}"
    return {
        "proc/self/cgroup": "0::/jobs/mine\n",
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{300 * MIB}\n",
        f"{folder}/memory.stat": f"anon 5\ninactive_file {100 * MIB}\nactive_file 7\n",
    }


@pytest.mark.parametrize("place", ["", "/jobs", "/jobs/mine"])
def test_cgroups_of_version_2_at_any_height(tmp_path: Path, place: str) -> None:
    assert linux_memory(lay(tmp_path, version_2(str(500 * MIB), place))) == 300 * MIB


def test_version_2_without_a_limit(tmp_path: Path) -> None:
    assert linux_memory(lay(tmp_path, version_2("max", "/jobs/mine"))) == 1024 * MIB


def test_a_cgroup_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    assert linux_memory(lay(tmp_path, version_2(str(100 * MIB), "/jobs"))) == 0


@pytest.mark.parametrize(("limit", "left"), [(400 * MIB, 250 * MIB), (9223372036854771712, 1024 * MIB)])
def test_cgroups_of_version_1(tmp_path: Path, limit: int, left: int) -> None:
    # a container sees its own cgroup at the mount, under a place that it does not have
    files = {
        "proc/self/cgroup": "12:cpu,cpuacct:/box\n4:memory:/box\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{limit}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{200 * MIB}\n",
        "sys/fs/cgroup/memory/memory.stat": f"cache 1\ntotal_inactive_file {50 * MIB}\n",
    }
    assert linux_memory(lay(tmp_path, files)) == left


@pytest.mark.skipif(sys.platform not in ("linux", "darwin", "win32"), reason="unknown elsewhere")
def test_this_machine_tells() -> None:
    assert (available_memory() or 0) > 2**24
