"""Training by the command line: its options, its record, and that a run stopped by a signal goes on bit for bit."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from cadapt.bundle import load_bundle, read_header
from tests.cli.conftest import FAST
from tests.cli.program import Ran, finish, run, start
from tests.data.pictures import make_classes

LONG = ("--epochs", "3", "--batch-size", "4", "--seed", "5", "--device", "cpu", "--ema", "0.9", "--mixup", "0.2")


def tensors_of(content: bytes) -> dict[str, bytes]:
    bundle = load_bundle(content)
    return {name: tensor.numpy().tobytes() for name, tensor in bundle.tensors.items()}


@pytest.fixture(scope="module")
def uninterrupted(shared: Path, imgs: Path, fresh: bytes) -> dict[str, bytes]:
    """The tensors of a run that nobody stopped."""
    path = shared / "long.safetensors"
    path.write_bytes(fresh)
    ran = run("train", imgs, "-m", path, *LONG, "--workers", "0", "-q", "--run", shared / "long-run")
    assert ran.code == 0, ran.stderr
    return tensors_of(path.read_bytes())


def stop_in_mid_epoch(number: signal.Signals, imgs: Path, workers: int, folder: Path) -> tuple[Ran, int]:
    """Start a run that saves each step, and send it a signal once a state is there; the steps of its last epoch."""
    process = start("train", imgs, *LONG, "--workers", workers, "--save-every", "0", "--run", folder)
    deadline = time.monotonic() + 90
    while not (folder / "state.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline, finish(process).stderr
        time.sleep(0.002)
    process.send_signal(number)
    ran = finish(process)
    ledger = torch.load(folder / "state.pt", weights_only=True)["ledger"]
    assert ledger["epoch"] < 3
    return ran, ledger["step"]


@pytest.mark.parametrize("workers", [0, 2, 4])
def test_a_killed_run_goes_on_to_the_same_bits(
    workers: int, adapter: Path, fresh: bytes, imgs: Path, uninterrupted: dict[str, bytes]
) -> None:
    ran, step = stop_in_mid_epoch(signal.SIGKILL, imgs, workers, Path("killed"))
    assert ran.code == -signal.SIGKILL
    assert step > 0
    assert adapter.read_bytes() == fresh
    resumed = run("train", "--resume", "killed", "--workers", workers)
    assert resumed.line == "adapter.safetensors"
    assert "going on after" in resumed.stderr
    assert tensors_of(adapter.read_bytes()) == uninterrupted


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_saves_and_its_hint_works_when_pasted(
    number: signal.Signals, code: int, adapter: Path, imgs: Path, uninterrupted: dict[str, bytes]
) -> None:
    ran, _ = stop_in_mid_epoch(number, imgs, 0, Path("a run"))
    assert (ran.code, ran.stdout) == (code, b"")
    assert f"stopped by {number.name}" in ran.errors[0]
    assert "saved in 'a run'" in ran.errors[0]
    program, *arguments = shlex.split(ran.errors[1].removeprefix("  hint: "))
    assert program == "cadapt"
    assert run(*arguments, "-q").code == 0
    assert tensors_of(adapter.read_bytes()) == uninterrupted


def test_a_run_stopped_before_it_begins_leaves_nothing(
    adapter: Path, imgs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_arguments: object, **_settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cadapt.jobs.training.open_training_data", interrupt)
    assert run("train", imgs, *FAST, "--run", "unbegun").code == 130
    assert not Path("unbegun").exists()


def test_resume_refuses_what_would_change_the_run(adapter: Path, imgs: Path) -> None:
    assert run("train", imgs, *FAST, "--run", "run", "-q").code == 0
    done = adapter.read_bytes()
    for arguments, said in (
        (["--lr", "0.5"], "--lr 0.001, not 0.5"),
        (["--epochs", "9"], "--epochs 1, not 9"),
        (["--seed", "1"], "--seed 0, not 1"),
        (["--shots", "1"], "--shots None, not 1"),
        (["--val-split", "0"], "--val-split 0.1, not 0.0"),
        (["--augment", "strong"], "--augment 'none', not 'strong'"),
        (["--new-head"], "--new-head False, not True"),
        (["elsewhere"], "not 'elsewhere'"),
        (["-m", "adapter.safetensors"], "--resume goes on with"),
        (["--run", "other"], "--resume goes on with"),
    ):
        ran = run("train", "--resume", "run", *arguments)
        assert (ran.code, ran.stdout) == (2, b""), arguments
        assert said in ran.errors[0]
    assert run("train", imgs, "--resume", "run", "--epochs", "1", "--save-every", "9", "-q").code == 0
    assert tensors_of(adapter.read_bytes()) == tensors_of(done)
    elsewhere = run("train", "--resume", "run", "-q", "-o", "elsewhere.safetensors")
    assert elsewhere.line == "elsewhere.safetensors"
    assert run("train", "--resume", "run", "-q", "-o", "elsewhere.safetensors").code == 2
    missing = run("train", "--resume", "none")
    assert (missing.code, missing.errors[0]) == (2, "cadapt: error: no run to resume in none: job.json is missing")


def test_a_run_folder_is_not_overwritten_without_force(adapter: Path, imgs: Path) -> None:
    assert run("train", imgs, *FAST, "--run", "run", "-q").code == 0
    before = {path.name: path.read_bytes() for path in Path("run").iterdir() if path.is_file()}
    ran = run("train", imgs, *FAST, "--run", "run")
    assert ran.code == 2
    assert "holds a run already" in ran.errors[0]
    assert {path.name: path.read_bytes() for path in Path("run").iterdir() if path.is_file()} == before
    assert run("train", imgs, *FAST, "--run", "run", "--force", "-q").code == 0


def test_zero_is_a_value(adapter: Path, imgs: Path) -> None:
    ran = run("train", imgs, *FAST, "--epochs", "0")
    assert (ran.code, "epochs is 0" in ran.errors[0]) == (2, True)
    assert run("train", imgs, *FAST, "--shots", "0").code == 2
    options = ["--val-split", "0", "--warmup-epochs", "0", "--head-dropout", "0", "--weight-decay", "0"]
    assert run("train", imgs, *FAST, *options, "-q").code == 0
    header = read_header(adapter)
    assert header.training["options"]["head_dropout"] == header.training["config"]["weight_decay"] == 0
    assert header.plan.head is not None and header.plan.head.dropout == 0
    assert "val_top1" not in header.training["best"]


@pytest.mark.parametrize(
    "options",
    [
        ["--augment", "light", "--label-smoothing", "0.1"],
        ["--augment", "structured", "--mixup", "0.2", "--cutmix", "0.5"],
        ["--augment", "standard", "--ema", "0.99", "--clip-grad", "1"],
        ["--augment", "strong", "--head-norm", "--head-dropout", "0.5", "--keep", "last"],
        ["--shots", "2", "--accumulate", "2", "--batch-size", "2"],
    ],
    ids=lambda options: options[1],
)
def test_options_are_recorded(options: list[str], adapter: Path, imgs: Path) -> None:
    ran = run("train", imgs, *FAST, *options, "--json", "--run", "run")
    assert ran.code == 0, ran.stderr
    header = read_header(adapter)
    told = {**header.training["options"], **header.training["config"]}
    for name, value in zip(options, [*options[1:], "--"], strict=True):
        if name.startswith("--"):
            found = told[name[2:].replace("-", "_")]
            assert found == (True if value.startswith("--") else type(found)(value))
    assert header.classes == ("cat", "dog")
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines].count("epoch") == 1


def test_a_trained_adapter_is_trained_on(trained_adapter: Path, trained: bytes, imgs: Path) -> None:
    assert run("train", imgs, *FAST, "--lr", "0.01", "-q").code == 0
    before, after = tensors_of(trained), tensors_of(trained_adapter.read_bytes())
    assert before.keys() == after.keys()
    assert before != after


def test_a_new_head_keeps_the_adapters(trained_adapter: Path, here: Path) -> None:
    folder = make_classes(here / "birds", {"emu": 3, "kea": 3, "tui": 3}, (20, 18))
    ran = run("train", folder, *FAST, "--new-head", "-o", "birds.safetensors", "-q")
    assert ran.code == 0, ran.stderr
    assert read_header(here / "birds.safetensors").classes == ("emu", "kea", "tui")


@pytest.mark.parametrize("scheme", ["linear", "full"])
def test_baselines_reload_to_the_figure_of_training(scheme: str, here: Path) -> None:
    folder = here / "split"
    make_classes(folder / "train", {"cat": 8, "dog": 8}, (20, 18))
    make_classes(folder / "val", {"cat": 5, "dog": 5}, (20, 18))
    made = run("insert", "test_resnet", "--no-pretrained", "--img-size", "32", "--scheme", scheme, "-q")
    assert made.code == 0, made.stderr
    trained = run("train", folder, *FAST, "--epochs", "3", "--lr", "0.01", "--json", "-q")
    assert trained.code == 0, trained.stderr
    found = run("eval", folder, "--workers", "0", "--json", "-q", "--batch-size", "8").json
    assert found["top1"] == pytest.approx(trained.json["best"]["val_top1"], abs=1e-9)
    assert found["loss"] == pytest.approx(trained.json["best"]["val_loss"], rel=1e-5)
    saved = load_bundle(here / "adapter.safetensors").tensors
    statistics = [tensor for name, tensor in saved.items() if name.endswith("running_mean")]
    if scheme == "linear":
        assert statistics == []
    else:
        assert statistics and any(bool(tensor.any()) for tensor in statistics)


def test_val_names_another_source(adapter: Path, imgs: Path, here: Path) -> None:
    held = make_classes(here / "held", {"cat": 2, "dog": 3}, (20, 18))
    found = run("train", imgs, *FAST, "--val", held, "--json").json["data"]
    assert found["val_source"] == "held"
    assert found["val_split"] is None


def test_a_torchvision_reader(adapter: Path, here: Path) -> None:
    make_classes(here / "set" / "train", {"cat": 4, "dog": 4}, (20, 18))
    make_classes(here / "set" / "validation", {"cat": 2, "dog": 2}, (20, 18))
    ran = run("train", "torch/image_folder@set#train", *FAST, "--val", "torch/image_folder@set#validation", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.json["classes"] == ["cat", "dog"]


@pytest.mark.parametrize(("source", "package"), [("wds/set", "webdataset"), ("hfds/some/set", "datasets")])
def test_a_reader_without_its_package(
    source: str, package: str, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else find(name))
    Path("set").mkdir()
    Path("set/train-000.tar").touch()
    ran = run("train", source, *FAST)
    assert ran.code == 1
    assert f"needs the package '{package}'" in ran.errors[0]
    assert ran.errors[1] == f"  hint: pip install 'cadapt[{source.partition('/')[0]}]'"


def test_shards(adapter: Path, here: Path, imgs: Path) -> None:
    pytest.importorskip("webdataset")
    import io
    import tarfile

    (here / "set").mkdir()
    with tarfile.open(here / "set" / "train-000.tar", "w") as shard:
        for number, path in enumerate(sorted(imgs.rglob("*.png"))):
            label = str(int(path.parent.name == "dog")).encode()
            for name, data in ((f"{number:04d}.png", path.read_bytes()), (f"{number:04d}.cls", label)):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                shard.addfile(entry, io.BytesIO(data))
    ran = run("train", "wds/set", *FAST, "--json")
    assert ran.code == 0, ran.stderr
    assert ran.json["classes"] == ["0", "1"]


def test_two_runs_in_one_second_have_two_folders(adapter: Path, imgs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda _format: "20261121-120000")
    for _ in range(2):
        assert run("train", imgs, *FAST, "-q").code == 0
    names = sorted(path.name for path in Path("runs").iterdir())
    assert names == ["adapter-20261121-120000", "adapter-20261121-120000-2"]


def test_sigterm_to_another_command_leaves_no_file(here: Path) -> None:
    process = start("insert", "resnet10t", "--no-pretrained", "--scheme", "conv-par", stdout=subprocess.DEVNULL)
    assert process.stderr is not None
    assert process.stderr.readline() == b"cadapt insert \xe2\x80\xa6\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert finish(process).code == 143
    assert list(here.iterdir()) == []
