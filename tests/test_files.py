import errno
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cadapt import files
from cadapt.errors import CadaptError, UsageError
from cadapt.files import write_atomically
from cadapt.known_checkpoints import recall_checkpoint, remember_checkpoint


@pytest.fixture
def umask():
    previous = os.umask(0o027)
    yield
    os.umask(previous)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cadapt" / "checkpoints.json"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("data", [b"new", lambda handle: handle.write(b"new")])
def test_writes_with_the_umask_and_leaves_nothing_else(tmp_path, umask, data, overwrite):
    write_atomically(tmp_path / "out", data, overwrite=overwrite)
    assert (tmp_path / "out").read_bytes() == b"new"
    assert mode(tmp_path / "out") == 0o640
    assert names(tmp_path) == ["out"]


def test_an_existing_file_is_kept_unless_forced_and_then_keeps_its_mode(tmp_path):
    target = tmp_path / "out"
    target.write_bytes(b"old")
    target.chmod(0o600)
    with pytest.raises(UsageError, match=r"out' exists") as caught:
        write_atomically(target, pytest.fail, overwrite=False)
    assert "--force" in caught.value.hint
    assert target.read_bytes() == b"old"
    write_atomically(target, b"new", overwrite=True)
    assert (target.read_bytes(), mode(target)) == (b"new", 0o600)


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_file_that_appears_in_between_is_not_lost(tmp_path, monkeypatch, hard_links):
    def refuse(source, target):
        raise OSError(errno.EPERM, "no hard links", str(source))

    def write(handle):
        handle.write(b"new")
        (tmp_path / "out").write_bytes(b"theirs")

    if not hard_links:
        monkeypatch.setattr(files.os, "link", refuse)
    with pytest.raises(UsageError, match="exists"):
        write_atomically(tmp_path / "out", write, overwrite=False)
    assert (tmp_path / "out").read_bytes() == b"theirs"
    assert names(tmp_path) == ["out"]
    write_atomically(tmp_path / "other", b"new", overwrite=False)
    assert (tmp_path / "other").read_bytes() == b"new"


def test_a_failed_rename_without_hard_links_leaves_no_empty_file(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(files.os, "link", refuse)
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(CadaptError, match="not supported"):
        write_atomically(tmp_path / "out", b"new", overwrite=False)
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    def write(handle):
        handle.write(b"half")
        raise error

    (tmp_path / "out").write_bytes(b"old")
    with pytest.raises(error):
        write_atomically(tmp_path / "out", write, overwrite=True)
    assert (tmp_path / "out").read_bytes() == b"old"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if failing == "fsync":
        monkeypatch.setattr(files.os, "fsync", full)
    if failing == "replace":
        monkeypatch.setattr(Path, "replace", full)
    (tmp_path / "out").write_bytes(b"old")
    with pytest.raises(CadaptError, match=r"cannot write '.*out': No space left") as caught:
        write_atomically(tmp_path / "out", full if failing == "write" else b"new", overwrite=True)
    assert caught.value.exit_code == 1
    assert "\n" not in caught.value.message
    assert (tmp_path / "out").read_bytes() == b"old"
    assert names(tmp_path) == ["out"]


def test_a_real_limit_of_the_file_size_is_one_line(tmp_path):
    script = (
        "import resource, sys\n"
        "from cadapt.files import write_atomically\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_atomically(sys.argv[1], b'x' * 5000, overwrite=True)\n"
    )
    (tmp_path / "out").write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "out"], capture_output=True, text=True, check=False)
    assert "CadaptError: cannot write" in done.stderr.splitlines()[-1]
    assert (tmp_path / "out").read_bytes() == b"old"
    assert names(tmp_path) == ["out"]


def test_what_cannot_be_written_is_one_line_with_the_reason(tmp_path):
    with pytest.raises(CadaptError, match="cannot write .*No such file or directory"):
        write_atomically(tmp_path / "missing" / "out", b"", overwrite=False)
    with pytest.raises(CadaptError, match="cannot write .*Is a directory"):
        write_atomically(tmp_path, b"", overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(CadaptError, match="cannot write .*Not a directory"):
        write_atomically(tmp_path / "file" / "out", b"", overwrite=True)
    with pytest.raises(CadaptError, match="cannot write .*too long"):
        write_atomically(tmp_path / ("x" * 300), b"", overwrite=True)


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a folder where even root cannot write")
def test_a_read_only_folder_is_one_line():
    with pytest.raises(CadaptError, match="cannot write '/sys/kernel/out'") as caught:
        write_atomically("/sys/kernel/out", b"", overwrite=False)
    assert caught.value.exit_code == 1


def test_errors_on_other_files_are_not_taken_for_the_outputs(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "out", lambda _: Path("/nonexistent/input").read_bytes(), overwrite=False)
    assert names(tmp_path) == []


def test_a_symbolic_link_is_written_through(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "real")
    write_atomically(tmp_path / "link", b"one", overwrite=False)
    write_atomically(tmp_path / "link", b"two", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "real").read_bytes() == b"two"
    assert names(tmp_path / "folder") == ["real"]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(CadaptError, match="symbolic links"):
        write_atomically(tmp_path / "loop", b"", overwrite=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has /dev/full")
def test_devices_are_written_straight():
    write_atomically("/dev/null", b"data", overwrite=False)
    with pytest.raises(CadaptError, match="cannot write '/dev/full': No space left"):
        write_atomically("/dev/full", b"data", overwrite=False)


def test_a_fifo_is_written_straight(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "fifo").read_bytes()))
    reader.start()
    write_atomically(tmp_path / "fifo", b"data", overwrite=False)
    reader.join(timeout=10)
    assert got == [b"data"]


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_is_appended_to_as_the_shell_redirected_it(tmp_path, name):
    script = "import sys; from cadapt.files import write_atomically as w; w(sys.argv[1], b'new', overwrite=False)"
    (tmp_path / "log").write_bytes(b"old ")
    with (tmp_path / "log").open("ab") as log:
        subprocess.run([sys.executable, "-c", script, name], stdout=log, check=True)
    assert (tmp_path / "log").read_bytes() == b"old new"


KILLED = """
import sys, time
from cadapt.files import write_atomically

def write(handle):
    handle.write(b"half")
    handle.flush()
    print("writing", flush=True)
    time.sleep(60)

write_atomically(sys.argv[1], write, overwrite=True)
"""


def test_a_killed_write_leaves_the_old_file_and_the_next_write_cleans_up(tmp_path):
    target = tmp_path / "out"
    target.write_bytes(b"old")
    process = subprocess.Popen([sys.executable, "-c", KILLED, target], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"writing\n"
        # a live writer's file is left alone
        write_atomically(tmp_path / "other", b"", overwrite=True)
        assert len(names(tmp_path)) == 3
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert target.read_bytes() == b"old"
    assert len(names(tmp_path)) == 3
    write_atomically(target, b"new", overwrite=True)
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == ["other", "out"]


def test_a_temporary_file_that_another_run_takes_is_made_again(tmp_path, monkeypatch):
    lock, taken = files._lock, []

    def steal(descriptor):
        for path in tmp_path.glob(".cadapt-*"):
            if not taken:
                taken.append(path)
                path.unlink()
        return lock(descriptor)

    monkeypatch.setattr(files, "_lock", steal)
    write_atomically(tmp_path / "out", b"new", overwrite=False)
    assert len(taken) == 1
    assert names(tmp_path) == ["out"]


def test_writers_at_the_same_time_leave_one_whole_file(tmp_path):
    outcomes = []

    def write(number):
        try:
            write_atomically(tmp_path / "out", bytes([number]) * 10000, overwrite=False)
            outcomes.append(number)
        except UsageError:
            outcomes.append(None)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [number for number in outcomes if number is not None]
    assert len(outcomes) == 8
    assert len(winners) == 1
    assert (tmp_path / "out").read_bytes() == bytes(winners) * 10000
    assert names(tmp_path) == ["out"]


def test_a_checkpoint_is_remembered_while_it_is_there(tmp_path, cache):
    checkpoint = tmp_path / "a.pth"
    checkpoint.touch()
    assert recall_checkpoint("1" * 64) is None
    remember_checkpoint("1" * 64, checkpoint)
    remember_checkpoint("2" * 64, tmp_path / "gone.pth")
    assert recall_checkpoint("1" * 64) == checkpoint
    assert recall_checkpoint("2" * 64) is None
    assert names(cache.parent) == ["checkpoints.json"]


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"[1]", b'{"checkpoints": 3}', b"[" * 100_000])
def test_a_damaged_index_is_rebuilt(tmp_path, cache, damage):
    cache.parent.mkdir(parents=True)
    cache.write_bytes(damage)
    assert recall_checkpoint("1") is None
    (tmp_path / "a.pth").touch()
    remember_checkpoint("1", tmp_path / "a.pth")
    assert recall_checkpoint("1") == tmp_path / "a.pth"
    assert json.loads(cache.read_bytes())["version"] == 1


def test_an_unwritable_cache_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    remember_checkpoint("1", tmp_path / "file")
    assert recall_checkpoint("1") is None


def test_a_relative_cache_folder_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a").touch()
    remember_checkpoint("1", tmp_path / "a")
    assert (tmp_path / ".cache" / "cadapt" / "checkpoints.json").is_file()
    assert recall_checkpoint("1") == tmp_path / "a"
