import multiprocessing
import os
import signal
import time

import pytest

from cadapt.data import beside
from cadapt.data.beside import CheckBeside
from cadapt.data.folder import find_images
from cadapt.data.readable import UnreadableImages
from cadapt.data.source import open_training_data
from cadapt.errors import CadaptError
from tests.data.pictures import make_classes, truncate


@pytest.fixture
def root(tmp_path):
    return make_classes(tmp_path / "pets", {"cat": 40, "dog": 30})


@pytest.fixture
def gate(tmp_path, monkeypatch):
    """A file without which no picture is judged."""
    path, real = tmp_path / "gate", beside.Pictures.check

    def check(self, index):
        while not path.exists():
            time.sleep(0.005)
        real(self, index)

    monkeypatch.setattr(beside.Pictures, "check", check)
    return path


@pytest.fixture
def start():
    """Starts checks that do not outlive the test."""
    checks = []

    def begin(*parts, workers=2):
        checks.append(CheckBeside(parts, workers))
        return checks[-1]

    yield begin
    for check in checks:
        check.close()
        assert not check._process.is_alive()


def test_a_good_source_passes(root, start):
    check = start(find_images(root))
    check.finish()
    assert check.finished
    check.look()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_all_bad_pictures_are_named_in_order(root, start, workers):
    for name in ("dog/029.png", "cat/003.png", "dog/001.png"):
        truncate(root / name)
    with pytest.raises(
        UnreadableImages, match=r"3 of 140 images cannot be read: .*cat/003.*dog/001.*dog/029"
    ) as caught:
        start(
            find_images(root),
            find_images(make_classes(root.parent / "val", {"a": 70}), minimum_classes=1),
            workers=workers,
        ).finish()
    assert (len(caught.value.files), caught.value.exit_code) == (3, 4)


def test_batches_go_on_until_something_is_found(root, start, gate):
    truncate(root / "dog" / "029.png")
    check = start(find_images(root))
    batches = check.watched(iter(range(10**9)))
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    gate.touch()
    with pytest.raises(UnreadableImages, match="1 of 70"):
        for _ in batches:
            time.sleep(0.001)


def test_a_check_that_died_is_told(root, start, gate):
    check = start(find_images(root))
    os.kill(check._process.pid, signal.SIGKILL)
    with pytest.raises(CadaptError, match="check of pictures died after 0 of 70"):
        check.finish()


def test_the_systems_refusals_arrive(root, start, monkeypatch):
    def refuse(self, index):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(beside.Pictures, "check", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        start(find_images(root)).finish()


def test_a_killed_run_leaves_no_check_behind(root, gate, monkeypatch):
    """Its next report finds nobody: of 70 pictures it judges the 64 of that report."""
    ours, theirs = os.pipe()
    real = beside.Pictures.check
    monkeypatch.setattr(beside.Pictures, "check", lambda self, index: (real(self, index), os.write(theirs, b".")))

    def run():
        CheckBeside([find_images(root)], 0)
        os.kill(os.getpid(), signal.SIGKILL)

    killed = multiprocessing.get_context("fork").Process(target=run)
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    gate.touch()
    os.close(theirs)
    with os.fdopen(ours, "rb") as judged:  # to its end, when no process is left
        assert len(judged.read()) == 64


def test_closing_ends_the_process_at_once(root, start, gate):
    check = start(find_images(root))
    check.close()
    assert check._process.exitcode == -signal.SIGTERM


def test_ctrl_c_is_the_runs_own(root, start, gate):
    check = start(find_images(root))
    time.sleep(0.1)
    os.kill(check._process.pid, signal.SIGINT)
    gate.touch()
    check.finish()


def test_small_sources_and_skip_bad_are_checked_before(root, monkeypatch):
    assert open_training_data(str(root), beside=True).check is None
    monkeypatch.setattr("cadapt.data.source.CHECKED_AHEAD", 69)
    assert open_training_data(str(root), beside=True, skip_bad=True).check is None
    assert open_training_data(str(root)).check is None
    data = open_training_data(str(root), beside=True)
    assert data.check is not None
    data.check.finish()
    data.check.close()
    assert data.record == open_training_data(str(root)).record
