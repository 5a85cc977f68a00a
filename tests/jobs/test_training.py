"""Training beside the check of its pictures: the same results, and a bad picture stops it with nothing lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cadapt.data import beside
from tests.cli.conftest import BASE
from tests.cli.program import check_refused, run
from tests.data.pictures import make_classes, truncate

SETTINGS = ("--epochs", "2", "--batch-size", "8", "--augment", "light", "--device", "cpu", "--workers", "1", "-q")


@pytest.fixture
def imgs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source of 24 pictures in the working folder, which is not small here, and an adapter beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cadapt.data.source.CHECKED_AHEAD", 4)
    assert run("insert", *BASE, "-q").code == 0
    return make_classes(tmp_path / "imgs", {"cat": 12, "dog": 12}, (20, 18))


@pytest.fixture
def held_until(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Lets the check of pictures begin only when a file is there."""
    real = beside.Pictures.check

    def hold(path: Path) -> None:
        def check(self: beside.Pictures, index: int) -> None:
            while not path.exists():
                time.sleep(0.005)
            real(self, index)

        monkeypatch.setattr(beside.Pictures, "check", check)

    return hold


def test_the_result_is_that_of_a_check_before(imgs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("train", imgs, *SETTINGS, "-o", "beside.safetensors", "--run", "beside").code == 0
    monkeypatch.setattr("cadapt.data.source.CHECKED_AHEAD", 1000)
    assert run("train", imgs, *SETTINGS, "-o", "before.safetensors", "--run", "before").code == 0
    assert Path("beside/best.safetensors").read_bytes() == Path("before/best.safetensors").read_bytes()


@pytest.mark.parametrize("found_by", ["check", "reader"])
def test_bad_pictures_stop_a_run_that_goes_on_when_they_are_mended(
    found_by: str, imgs: Path, held_until: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("train", imgs, *SETTINGS, "-o", "whole.safetensors", "--run", "whole").code == 0
    bad = [imgs / "cat" / "003.png", imgs / "dog" / "007.png"]
    good = [path.read_bytes() for path in bad]
    for path in bad:
        truncate(path)
    # with its first line of metrics a run has begun; the reader finds a picture long before the check is through
    held_until(Path("run/run.json") if found_by == "check" else Path("run/state.pt"))
    ran = run("train", imgs, *SETTINGS, "-o", "out.safetensors", "--run", "run")
    said = "2 of 24 images cannot be read: ", "cat/003.png (", "dog/007.png ("
    check_refused(ran, 4, *said, hint="or replace them; then cadapt train --resume run")
    assert Path("run/state.pt").exists()
    assert not Path("out.safetensors").exists()
    for path, content in zip(bad, good, strict=True):
        path.write_bytes(content)
    assert run("train", "--resume", "run", "-q").code == 0
    assert Path("run/best.safetensors").read_bytes() == Path("whole/best.safetensors").read_bytes()


def test_bad_pictures_found_before_the_first_step_leave_no_run(imgs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truncate(imgs / "cat" / "003.png")
    real = beside.CheckBeside.look
    # as if building the base had taken longer
    monkeypatch.setattr(beside.CheckBeside, "look", lambda self: (self.finish(), real(self)))
    ran = run("train", imgs, *SETTINGS, "--run", "run")
    check_refused(ran, 4, "1 of 24 images cannot be read", hint="--skip-bad")
    assert not Path("run").exists()


def test_a_run_ends_well_only_when_all_was_checked(imgs: Path, held_until: Callable[[Path], None]) -> None:
    bad = next(path for path in sorted((imgs / "dog").iterdir()))
    truncate(bad)
    held_until(Path("run/best.safetensors"))
    # one picture of each class to train on, and none held out: the bad one is not among them
    few = ("--shots", "1", "--val-split", "0", "--seed", "1")
    ran = run("train", imgs, *SETTINGS, *few, "-o", "out.safetensors", "--run", "run")
    check_refused(ran, 4, "1 of 24 images cannot be read", hint="cadapt train --resume run")
    assert not Path("out.safetensors").exists()
