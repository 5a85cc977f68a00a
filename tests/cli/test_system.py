"""What the system refuses: read-only folders, full disks, files in the way. Nothing is lost by it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.conftest import BASE, FAST
from tests.cli.program import check_refused, run

QUIET = (*FAST, "-q")


@contextmanager
def _immutable(folder: Path) -> Iterator[None]:
    """Make a folder read-only, even for root."""
    if os.getuid():
        folder.chmod(0o500)
    elif subprocess.run(["chattr", "+i", folder], capture_output=True, check=False).returncode:
        pytest.skip("this file system has no immutable folders, and root writes everywhere")
    try:
        yield
    finally:
        if os.getuid():
            folder.chmod(0o700)
        else:
            subprocess.run(["chattr", "-i", folder], check=True)


def test_a_read_only_folder_is_noticed_before_the_work(adapter: Path, imgs: Path, here: Path) -> None:
    shut = here / "shut"
    shut.mkdir()
    with _immutable(shut):
        for arguments in (["insert", *BASE], ["export"], ["train", imgs, *FAST]):
            check_refused(
                run(*arguments, "-o", "shut/a.safetensors"), 1, "cannot write into the folder 'shut'", hint="-o"
            )
        check_refused(run("train", imgs, *FAST, "--run", "shut/run"), 1, "'shut/run'", hint=None)
    assert list(shut.iterdir()) == []
    assert not list(here.glob("runs/*"))


def test_a_run_folder_that_is_a_file(adapter: Path, imgs: Path) -> None:
    Path("taken").write_text("mine")
    check_refused(run("train", imgs, *FAST, "--run", "taken"), 1, "'taken'", hint=None)
    assert Path("taken").read_text() == "mine"


@contextmanager
def _files_of_at_most(size: int) -> Iterator[None]:
    """Let the system refuse to write larger files, as a full disk does."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_no_file_and_no_temporary_one(adapter: Path, fresh: bytes, here: Path) -> None:
    for arguments in (["insert", *BASE, "-o", "new.safetensors"], ["export", "-o", "new.safetensors"]):
        with _files_of_at_most(20_000):
            ran = run(*arguments, "-q")
        check_refused(ran, 1, "cannot write 'new.safetensors': File too large", hint="-o FILE")
    assert [path.name for path in here.iterdir()] == ["adapter.safetensors"]
    assert adapter.read_bytes() == fresh


@pytest.mark.parametrize("size", [20_000, 80_000, 200_000])
def test_a_disk_that_fills_while_training(size: int, adapter: Path, fresh: bytes, imgs: Path) -> None:
    with _files_of_at_most(size):
        ran = run("train", imgs, *QUIET)
    check_refused(ran, 1, hint=None)
    assert "File too large" in ran.errors[0]
    assert adapter.read_bytes() == fresh
    assert not list(Path().rglob("*.tmp"))


def test_a_result_that_cannot_be_written_is_kept_in_the_run(
    adapter: Path, imgs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object, **_settings: object) -> None:
        raise OSError(28, "No space left on device", "out.safetensors")

    with monkeypatch.context() as patched:
        patched.setattr("cadapt.cli.train.deliver", refuse)
        ran = run("train", imgs, *QUIET, "-o", "out.safetensors", "--run", "kept run")
    check_refused(ran, 1, "No space left on device", hint="cadapt train --resume 'kept run'")
    again = run("train", "--resume", "kept run", "-q")
    assert again.line == "out.safetensors"
