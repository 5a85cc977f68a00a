"""``cadapt merge-report`` as a user runs it: what it writes, where, what it refuses, and how it ends."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import timm
import torch

from cadapt.bundle import bundle_bytes, load_bundle, read_header
from cadapt.jobs import merging
from cadapt.library import base_of, from_bundle
from cadapt.merging import Latency, ModelLatency
from tests.cli.program import check_refused, run
from tests.cli.test_json import check_golden
from tests.jobs.lively import BASE as NET
from tests.jobs.lively import SIDE, lively_bundle

ON_CPU = ("--workers", "0", "--device", "cpu", "--no-latency")


@pytest.fixture(scope="session")
def linear_bytes() -> bytes:
    return bundle_bytes(lively_bundle(activation="identity"))


@pytest.fixture(scope="session")
def bent_bytes() -> bytes:
    return bundle_bytes(lively_bundle())


@pytest.fixture
def linear(here: Path, linear_bytes: bytes) -> Path:
    """An adapter that folds exactly, where commands look for one."""
    path = here / "adapter.safetensors"
    path.write_bytes(linear_bytes)
    return path


@pytest.fixture
def bent(here: Path, bent_bytes: bytes) -> Path:
    """An adapter that folds by fitting only."""
    path = here / "adapter.safetensors"
    path.write_bytes(bent_bytes)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names() -> set[str]:
    return {item.name for item in Path().iterdir()}


def test_apply_writes_a_file_that_the_other_commands_take(linear: Path, imgs: Path) -> None:
    before = sha256(linear)
    ran = run("merge-report", "--data", imgs, *ON_CPU, "--apply")
    assert ran.code == 0, ran.stderr
    assert ran.line == "adapter-merged.safetensors"
    assert "wrote adapter-merged.safetensors" in ran.stderr
    assert names() == {"adapter.safetensors", "adapter-merged.safetensors"}
    assert sha256(linear) == before
    old, new = read_header(linear), read_header(Path(ran.line))
    assert new.plan.base == old.plan.base and new.plan.scheme == old.plan.scheme
    assert not new.plan.insertions and new.plan.deltas
    assert new.classes == old.classes and new.preprocessing == old.preprocessing
    one, other = (
        run("eval", imgs, "-m", path, "--workers", "0", "--device", "cpu", "--json", "-q").json
        for path in (linear, ran.line)
    )
    assert one["top1"] == other["top1"]
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    again = run("merge-report", "-m", ran.line, "--json", "-q").json
    assert again["differences"] == len(new.plan.deltas) and again["total"] == 0
    assert run("export", "-m", ran.line, "-o", "packed.safetensors", "-q").code == 0
    assert run("inspect", ran.line, "--json").code == 0


def test_the_report_by_itself_writes_nothing(linear: Path) -> None:
    ran = run("merge-report")
    assert (ran.code, ran.stdout) == (0, b"")
    assert names() == {"adapter.safetensors"}
    assert "2 of 2 adapters fold into the base exactly" in ran.stderr
    assert run("merge-report", "-q").stderr == ""


def test_outputs_are_not_overwritten(linear: Path) -> None:
    Path("there.safetensors").write_bytes(b"there")
    check_refused(run("merge-report", "--apply", "-o", "there.safetensors"), 2, "exists", hint="--force")
    check_refused(run("merge-report", "--html", "there.safetensors"), 2, "exists", hint="--force")
    assert Path("there.safetensors").read_bytes() == b"there"
    ran = run("merge-report", "--apply", "-o", "there.safetensors", "--force", "-q")
    assert ran.code == 0 and ran.line == "there.safetensors"
    assert read_header(Path(ran.line)).plan.deltas


@pytest.mark.parametrize("option", [("--apply", "-o"), ("--html",)])
def test_the_adapter_itself_is_never_overwritten(linear: Path, option: tuple[str, ...]) -> None:
    before = sha256(linear)
    Path("link.safetensors").symlink_to(linear)
    for name in (linear.name, "link.safetensors"):
        ran = run("merge-report", *option, name, "--force")
        check_refused(ran, 2, "is the adapter itself, which is never changed", hint=option[-1])
    assert sha256(linear) == before


@pytest.mark.parametrize(
    ("arguments", "said", "hint"),
    [
        (["--tolerance", "top1=0.5%"], "--tolerance needs pictures", "--data"),
        (["--tolerance", "top2=1%", "--data", "x"], "unknown tolerance 'top2=1%'", "top1"),
        (["--tolerance", "top1=2", "--data", "x"], "allows 200% to be lost", "top1=2%"),
        (["--fit-data", "x"], "--fit-data needs pictures", "--data"),
        (["--finetune-epochs", "2"], "--finetune-epochs needs pictures", "--data"),
        (["--data", "x", "--no-fit", "--fit-data", "y"], "contradict", "leave one"),
        (["--timm"], "--timm belongs to --apply", "--apply --timm"),
        (["-o", "x"], "-o belongs to --apply", "--apply -o"),
        (["--dtype", "fp31"], "unknown dtype 'fp31'", "fp32"),
        (["--fit-images", "0"], "invalid value for '--fit-images'", "--help"),
        (["--html", "-"], "--html writes a file", "report.html"),
        (["--html", "nowhere/report.html"], "no folder 'nowhere'", "mkdir"),
        (["--html", "same", "--apply", "-o", "same"], "both name 'same'", "two files"),
        (["--apply", "-o", "-", "--json"], "both write to stdout", "leave one out"),
        (["--data", "x", "--device", "abacus"], "unknown device", "auto"),
        (["--data", "nowhere"], "no folder 'nowhere'", ""),
    ],
)
def test_wrong_usage(linear: Path, arguments: list[str], said: str, hint: str) -> None:
    ran = run("merge-report", *arguments)
    check_refused(ran, 1 if "mkdir" in hint else 2, said, hint=hint)
    assert names() == {"adapter.safetensors"}


def test_classes_that_are_not_the_models(linear: Path, here: Path) -> None:
    from tests.data.pictures import make_classes

    other = make_classes(here / "other", {"owl": 2, "fox": 2})
    check_refused(run("merge-report", "--data", other), 4, "none of the data's classes", hint="name the folders")


def test_a_missed_tolerance_is_exit_3_and_writes_nothing(linear: Path, imgs: Path) -> None:
    # merged in fp32, the logits differ by rounding, which is more than nothing
    options = ["--data", imgs, *ON_CPU, "--tolerance", "logit=0", "--html", "report.html", "--json", "-q"]
    ran = run("merge-report", *options, "--apply", "-o", "merged.safetensors")
    assert ran.code == 3
    assert ran.stderr.splitlines()[0].startswith("cadapt: error: the merged model is not within logit=0: a logit")
    assert names() == {"adapter.safetensors", "report.html"}
    assert ran.json["tolerance_met"] is False and ran.json["output"] is None
    assert ran.json["missed"] in ran.stderr


def test_bytes_come_and_go_through_pipes(linear_bytes: bytes, imgs: Path) -> None:
    ran = run("merge-report", "--apply", "-o", "-", "-q", stdin=linear_bytes)
    assert ran.code == 0, ran.stderr
    assert not load_bundle(ran.stdout).plan.insertions
    judged = run("eval", imgs, "--workers", "0", "--device", "cpu", "--json", "-q", stdin=ran.stdout)
    assert judged.json["images"] == 12
    assert names() == set()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_checkpoint_that_timm_loads(linear: Path, dtype: str) -> None:
    ran = run("merge-report", "--apply", "--timm", "--dtype", dtype, "-q")
    assert ran.code == 0, ran.stderr
    assert ran.line == "adapter-merged-timm.safetensors"
    model = timm.create_model(NET, num_classes=2, checkpoint_path=ran.line).eval()
    bundle = load_bundle(linear)
    adapted = from_bundle(bundle, base_of(bundle))
    images = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, got = adapted(images), model(images)
    bound = {"fp32": 1e-5, "bf16": 0.1}[dtype]
    assert float((wanted - got).abs().max()) <= bound * float(wanted.abs().max())


def test_no_checkpoint_where_adapters_are_left(bent: Path) -> None:
    ran = run("merge-report", "--apply", "--timm")
    check_refused(ran, 1, "2 adapters did not fold into the base", hint="cadapt export --onnx")
    assert names() == {"adapter.safetensors"}


def test_an_untrained_adapter_has_nothing_to_compare(adapter: Path, imgs: Path) -> None:
    for arguments in (["--data", imgs], ["--apply", "--timm"]):
        check_refused(run("merge-report", *arguments), 1, "was not trained", hint="cadapt train")


def test_a_fitted_merge_with_all_that_can_be_asked_for(bent: Path, imgs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tuple(
        ModelLatency(name=name, milliseconds=1.0, ratio=1.0, ratio_low=0.9, ratio_high=1.1, nodes=9, bytes=10)
        for name in ("base", "adapted", "merged")
    )
    measured = Latency(models=rows, batch_size=1, turns=9, threads=1, runtime="made up")
    monkeypatch.setattr(merging, "compare_models", lambda *_, **__: measured)
    options = ["--workers", "0", "--device", "cpu", "--tolerance", "disagreement=100%", "--html", "report.html"]
    ran = run("merge-report", "--data", imgs, *options, "--apply", "--json", "-q")
    found = check_golden("merge-report-fitted", ran)
    assert {row["status"] for row in found["sites"]} <= {"fitted", "dropped"}
    assert found["fit"]["images"] == found["fit"]["judged_images"] == 6
    assert [point["folded"] for point in found["frontier"]] == [0, 1, 2]
    assert found["tolerance"] == "disagreement=100%"
    assert found["bytes"] == found["bytes_after"] == Path(found["output"]).stat().st_size
    assert found["bytes_before"] == bent.stat().st_size
    assert Path("report.html").read_text().startswith("<!doctype html>")
    assert names() == {"adapter.safetensors", "adapter-merged.safetensors", "report.html"}
    judged = run("eval", imgs, "-m", found["output"], "--workers", "0", "--device", "cpu", "--json", "-q").json
    assert judged["top1"] == found["on_data"]["top1_after"]


def test_a_page_alone_is_what_is_named_on_stdout(linear: Path) -> None:
    ran = run("merge-report", "--html", "report.html", "-q")
    assert ran.line == "report.html"


def test_phases_are_told_on_stderr_and_not_when_quiet(bent: Path, imgs: Path) -> None:
    ran = run("merge-report", "--data", imgs, *ON_CPU, "--fit-images", "4")
    assert (ran.code, ran.stdout) == (0, b"")
    for said in (
        "folding 2 adapters exactly",
        "kernels are fitted on 4 of the 6 pictures of one half of --data (seed 0)",
        "comparing both models in fp32 on 6 pictures",
    ):
        assert said in ran.stderr
