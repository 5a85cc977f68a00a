"""``cadapt merge-report a b``: what is compared, what is written, and what is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from cadapt.backbone import load_backbone
from cadapt.bundle import load_bundle, save_bundle
from cadapt.library import base_of, from_bundle, to_bundle
from cadapt.planning import plan_insertions, with_head
from cadapt.surgery import operate
from tests.cli.program import Ran, check_refused, run
from tests.cli.test_json import check_golden
from tests.data.pictures import make_classes

PETS, WILD = ("cat", "dog"), ("fox", "owl", "wolf")


def write(path: Path, scheme: str, classes: Sequence[str], *, task: int, seed: int = 0, norm: bool = False) -> Path:
    """An adapter of a base with random weights, moved at random as if trained."""
    backbone = load_backbone("test_resnet", pretrained=False, seed=seed, img_size=32)
    model = operate(backbone, with_head(plan_insertions(backbone, scheme), backbone, len(classes), norm=norm))
    generator = torch.Generator().manual_seed(task)
    for tensor in model.trained_tensors().values():
        tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    model.classes = tuple(classes)
    save_bundle(path, to_bundle(model), overwrite=True)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("several")
    return {
        "pets": write(folder / "pets.safetensors", "lora", PETS, task=1),
        "wild": write(folder / "wild.safetensors", "lora", WILD, task=2),
        "foreign": write(folder / "foreign.safetensors", "lora", WILD, task=3, seed=1),
        "conv": write(folder / "conv.safetensors", "conv-par", WILD, task=4),
        "normed": write(folder / "normed.safetensors", "lora", WILD, task=5, norm=True),
        "pets-data": make_classes(folder / "pets", dict.fromkeys(PETS, 4), (20, 18)),
        "wild-data": make_classes(folder / "wild", dict.fromkeys(WILD, 3), (20, 18)),
    }


def several(files: dict[str, Path], *arguments: object, names: Sequence[str] = ("pets", "wild")) -> Ran:
    return run("merge-report", *(files[name] for name in names), *arguments, "--device", "cpu", "--workers", "0")


def with_data(files: dict[str, Path]) -> tuple[object, ...]:
    return "--data", files["pets-data"], "--data", files["wild-data"]


def logits(path: Path) -> torch.Tensor:
    bundle = load_bundle(path)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return from_bundle(bundle, base_of(bundle))(x)


def test_conflicts_without_data(files: dict[str, Path], here: Path) -> None:
    ran = several(files)
    assert (ran.code, ran.stdout) == (0, b""), ran.stderr
    assert "layer1.0.conv1" in ran.stderr and "cosine" in ran.stderr and "--data" in ran.stderr.splitlines()[-1]
    assert list(here.iterdir()) == []


def test_json_page_and_file(files: dict[str, Path], here: Path) -> None:
    before = {name: hashlib.sha256(path.read_bytes()).digest() for name, path in files.items() if path.is_file()}
    page = here / "report.html"
    ran = several(files, *with_data(files), "--html", page, "--apply", "-o", "both.safetensors", "--json", "-q")
    found = check_golden("merge-report-several", ran)
    assert [item["method"] for item in found["combinations"]] == ["average", "linear", "ties", "dare"]
    assert [task["images"] for task in found["tasks"]] == [8, 9]
    assert found["classes"] == [*PETS, *WILD]
    best = max(found["combinations"], key=lambda item: (item["worst_open"], item["mean_known"]))
    assert "worst task" in found["chosen_by"]
    assert found["applied"] == found["best"] == best["method"]
    assert (found["output"], found["bytes"]) == ("both.safetensors", Path("both.safetensors").stat().st_size)
    text = page.read_text()
    assert "layer1.0.conv1" in text and "pets" in text and "<script" not in text
    assert before == {
        name: hashlib.sha256(path.read_bytes()).digest() for name, path in files.items() if path.is_file()
    }
    # what was written is what was judged
    shown = run(
        "eval", files["pets-data"], "-m", "both.safetensors", "--workers", "0", "--device", "cpu", "--json", "-q"
    )
    assert shown.json["top1"] == pytest.approx(best["open"][0], abs=1e-12)
    assert load_bundle("both.safetensors").plan.base == load_bundle(files["pets"]).plan.base


def test_weights_reach_the_file(files: dict[str, Path]) -> None:
    ran = several(files, "--method", "linear", "--weights", "0,1", "--apply", "-o", "one.safetensors", "-q")
    assert ran.line == "one.safetensors"
    torch.testing.assert_close(logits(Path("one.safetensors"))[:, 2:], logits(files["wild"]), rtol=0, atol=1e-5)
    assert run("export", "-m", "one.safetensors", "--timm", "-o", "one.timm.safetensors", "-q").code == 0


def test_without_pictures_ties_is_written_beside_the_first(files: dict[str, Path], here: Path) -> None:
    names = {name: here / f"{name}.safetensors" for name in ("pets", "wild")}
    for name, path in names.items():
        path.write_bytes(files[name].read_bytes())
    ran = several(names, "--density", "0.5", "--scale", "0.9", "--seed", "3", "--apply")
    assert ran.line == str(here / "combined.safetensors")
    record = load_bundle(here / "combined.safetensors").training["combined"]
    assert record["method"] == "ties" and "density 0.5; scale 0.9" in record["settings"]
    check_refused(several(names, "--apply"), 2, "combined.safetensors' exists", hint="--force")
    assert several(names, "--apply", "--force", "-q").code == 0


def test_what_cancels_is_told_and_refused(files: dict[str, Path], here: Path) -> None:
    opposed = ("--weights=-1,1",)
    told = several(files, *opposed, "--json", "-q", names=("pets", "pets"))
    assert (
        told.json["overall"][0]["cosine"] == pytest.approx(-1, abs=1e-9)
        and "against each other" in told.json["verdict"]
    )
    data = ("--data", files["pets-data"], "--data", files["pets-data"])
    for more in ((), data, ("--method", "linear")):
        ran = several(files, *opposed, *more, "--apply", "-o", "x", "-q", names=("pets", "pets"))
        check_refused(ran, 1, "the adapters cancel each other", hint="one sign")
    check_refused(several(files, *opposed, *data, "-q", names=("pets", "pets")), 1, "average, linear, ties, dare")
    assert list(here.iterdir()) == []


def test_bytes_on_stdout(files: dict[str, Path], here: Path) -> None:
    ran = several(files, "--apply", "-o", "-", "-q")
    assert ran.code == 0, ran.stderr
    assert load_bundle(ran.stdout).classes == (*PETS, *WILD)


def test_one_file_is_the_command_as_ever(files: dict[str, Path]) -> None:
    named, given = (
        run("merge-report", files["pets"], "--json", "-q"),
        run("merge-report", "-m", files["pets"], "--json"),
    )
    assert named.code == 0 and named.json == given.json


@pytest.mark.parametrize(
    ("names", "arguments", "code", "said", "hint"),
    [
        (("pets", "foreign"), (), 4, "different bases: 'pets' was made for test_resnet", "same base"),
        (("pets", "conv"), (), 2, "conv-par at 'layer1.0.conv1' of 'conv' does not fold", "same scheme"),
        (("pets", "normed"), ("--apply", "-o", "x"), 4, "the heads differ before their classifiers", "head"),
        (("pets", "wild"), ("--weights", "1"), 2, "got 1 weights for 2 adapters", "--weights 1,1"),
        (("pets", "wild"), ("--weights", "1,x"), 2, "weights are '1,x'", "--weights 1,1"),
        (("pets", "wild"), ("--weights", "0,0"), 2, "not all zero", "--weights 1,1"),
        (("pets", "wild"), ("--density", "2"), 2, "density is 2", "--density 0.2"),
        (("pets", "wild"), ("--method", "tie"), 2, "unknown method 'tie'", "ties"),
        (("pets", "wild"), ("--data", "imgs"), 2, "--data 1 times for 2 adapters", "one for each"),
        (("pets", "wild"), ("--data", "no", "--data", "no"), 2, "'no'", None),
        (("pets", "wild"), ("-o", "x"), 2, "-o belongs to --apply", "--apply"),
        (("pets", "wild"), ("--timm", "--apply"), 2, "--timm is for one adapter", "leave it out"),
        (("pets", "wild"), ("--tolerance", "top1=1%"), 2, "--tolerance is for one adapter", "leave it out"),
        (("pets",), ("--method", "ties"), 2, "--method is for several adapters", "b.safetensors"),
        (("pets",), ("-m", "x"), 2, "named twice", "leave one out"),
        (("pets",), ("--data", "x", "--data", "y"), 2, "2 times for one adapter", "one source"),
    ],
)
def test_refusals(
    files: dict[str, Path], here: Path, names: Sequence[str], arguments: Sequence[str], code: int, said: str,
    hint: str | None,
) -> None:  # fmt: skip
    check_refused(several(files, *arguments, "-q", names=names), code, said, hint=hint)
    assert list(here.iterdir()) == []


def test_an_adapter_is_never_an_output(files: dict[str, Path]) -> None:
    for arguments in (("--apply", "-o", files["wild"]), ("--html", files["pets"])):
        check_refused(several(files, *arguments, "--force"), 2, "is one of the adapters", hint="name another file")


def test_heads_that_do_not_join_are_judged_with_the_task_known(files: dict[str, Path]) -> None:
    ran = several(files, *with_data(files), "--method", "average", "--json", "-q", names=("pets", "normed"))
    assert ran.code == 0, ran.stderr
    assert ran.json["head"] == "none" and "differ" in ran.json["head_reason"]
    assert ran.json["combinations"][0]["open"] == [None, None]
    assert None not in ran.json["combinations"][0]["known"]
