"""Run folders: resumed from elsewhere without touching what is there, and never shared by two runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cadapt.data.readers import absolute_source
from cadapt.jobs import hold_folder, new_folder
from tests.cli.conftest import FAST
from tests.cli.program import check_refused, run
from tests.data.pictures import make_classes

_HOLDER = (
    "import sys; from pathlib import Path; from cadapt.jobs.hold import hold_folder\n"
    "with hold_folder(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
)


@contextmanager
def another_at_work(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a run folder."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", _HOLDER, str(folder)], **pipes)  # type: ignore[call-overload]
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.communicate("", timeout=20)


@pytest.fixture
def begun(here: Path, adapter: Path) -> Path:
    """The folder of a finished run in a folder of its own, all of it named by relative paths."""
    make_classes(here / "imgs", {"cat": 4, "dog": 4}, (20, 18))
    make_classes(here / "held" / "test", {"cat": 2, "dog": 2}, (20, 18))
    ran = run("train", "imgs", *FAST, "--val", "held", "--run", "run")
    assert ran.line == "adapter.safetensors", ran.stderr
    return here / "run"


def test_resuming_from_another_folder_leaves_its_adapter_alone(
    begun: Path, here: Path, fresh: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = (here / "adapter.safetensors").read_bytes()
    (here / "adapter.safetensors").unlink()
    elsewhere = here / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "adapter.safetensors").write_bytes(fresh)
    monkeypatch.chdir(elsewhere)
    ran = run("train", "--resume", "../run")
    assert ran.line == str(here / "adapter.safetensors"), ran.stderr
    assert Path("adapter.safetensors").read_bytes() == fresh
    assert (here / "adapter.safetensors").read_bytes() == done
    # what is said again is compared as what it means from here
    monkeypatch.chdir(here)
    for same in (["./imgs"], [here / "imgs", "--val", "imgs/../held"], ["-o", here / "adapter.safetensors"]):
        again = run("train", *same, "--resume", "run", "-q")
        assert again.code == 0, again.stderr
    monkeypatch.chdir(elsewhere)
    check_refused(run("train", "imgs", "--resume", "../run"), 2, "the run began with data", hint="leave it out")
    check_refused(run("train", "--val", "held", "--resume", "../run"), 2, "the run began with --val")
    check_refused(run("train", "--resume", "../run", "-o", "adapter.safetensors"), 2, "exists")
    assert Path("adapter.safetensors").read_bytes() == fresh


def test_the_record_holds_absolute_paths_and_the_adapter_none(begun: Path, here: Path) -> None:
    record = json.loads((begun / "job.json").read_text())
    assert record["output"] == str(here / "adapter.safetensors")
    assert (record["options"]["data"], record["options"]["val"]) == (str(here / "imgs"), str(here / "held"))
    assert str(here).encode() not in (here / "adapter.safetensors").read_bytes()


def test_an_output_to_stdout_stays_that(here: Path, adapter: Path, imgs: Path) -> None:
    assert run("train", imgs, *FAST, "-o", "-", "--run", "run", "-q").stdout
    assert json.loads(Path("run/job.json").read_text())["output"] == "-"


def test_absolute_sources(here: Path) -> None:
    for source, told in (
        ("imgs", f"{here}/imgs"),
        ("./wds/x", f"{here}/wds/x"),
        ("/data/x", "/data/x"),
        ("~/x", str(Path.home() / "x")),
        ("wds/x#val", f"wds/{here}/x#val"),
        ("torch/image_folder@set#train", f"torch/image_folder@{here}/set#train"),
        ("hfds/owner/pets", "hfds/owner/pets"),
    ):
        assert absolute_source(source) == told
        assert absolute_source(told) == told


def test_a_folder_where_another_is_at_work(begun: Path, here: Path) -> None:
    before = {path.name: path.read_bytes() for path in begun.iterdir() if path.is_file()}
    with another_at_work(begun):
        for arguments in (["--resume", "run"], ["imgs", "--run", "run"], ["imgs", "--run", "run", "--force"]):
            ran = run("train", *arguments, *FAST)
            check_refused(ran, 1, "another cadapt train is at work in 'run'", hint="--run DIR")
    assert {path.name: path.read_bytes() for path in begun.iterdir() if path.is_file()} == before
    assert run("train", "--resume", "run", "-q").code == 0


def test_a_killed_holder_holds_no_more(here: Path) -> None:
    with another_at_work(here / "run") as process:
        process.kill()
        process.wait()
        with hold_folder(here / "run"):
            assert [path.name for path in (here / "run").iterdir()] == [".lock"]
    assert not (here / "run").exists()


@pytest.mark.parametrize("name", ["job.json", "start.safetensors"])
def test_a_run_killed_before_the_engine_wrote_is_a_run(name: str, here: Path, adapter: Path, imgs: Path) -> None:
    (here / "run").mkdir()
    (here / "run" / name).write_text("another's")
    check_refused(run("train", imgs, *FAST, "--run", "run"), 2, f"'run' holds a run already ({name})", hint="--force")
    assert (here / "run" / name).read_text() == "another's"
    assert [path.name for path in (here / "run").iterdir()] == [name]
    assert run("train", imgs, *FAST, "--run", "run", "--force", "-q").code == 0


def test_new_folders_are_nobody_elses(here: Path) -> None:
    wanted = here / "runs" / "adapter-1"
    made = [new_folder(wanted) for _ in range(3)]
    assert [path.name for path in made] == ["adapter-1", "adapter-1-2", "adapter-1-3"]
    assert all(path.is_dir() for path in made)
