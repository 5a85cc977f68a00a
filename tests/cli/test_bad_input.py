"""Bad names, files and pictures: for each its one line, a hint, the right exit code, nothing written, nothing lost."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from cadapt.bundle import read_header
from tests.cli.conftest import BASE, FAST
from tests.cli.program import check_refused, run
from tests.data.pictures import make_classes, picture, truncate


def pets(folder: str | Path = "pets", **counts: int) -> Path:
    return make_classes(Path(folder), counts or {"cat": 3, "dog": 3}, (20, 18))


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- names and settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "said", "hint"),
    [
        (["resnet5", "--scheme", "conv-par"], 2, "unknown model 'resnet5'", "resnet50"),
        (["resnet50.a9_in1k", "--scheme", "conv-par"], 2, "unknown weights 'resnet50.a9_in1k'", "resnet50.a3_in1k"),
        (["test_resnet", "--scheme", "conv-pat"], 2, "unknown scheme 'conv-pat'", "did you mean conv-par"),
        ([*BASE, "--gamma", "7"], 2, "192 channels do not divide by γ=7; here γ can be 1, 2, 4", "--gamma"),
        ([*BASE, "--gamma", "0"], 2, "γ is 0", "--gamma 4"),
        ([*BASE, "--set", "gama=4"], 2, "no setting 'gama'", "gamma"),
        ([*BASE, "--set", "gamma"], 2, "not KEY=VALUE", "--set"),
        (["test_resnet", "--scheme", "conv-par"], 1, "cannot get the pretrained weights", "--no-pretrained"),
        ([*BASE, "-o", "missing/a.safetensors"], 1, "no folder 'missing'", "mkdir -p missing"),
        ([*BASE, "-o", "."], 2, "is a folder", "-o"),
        (["test_resnet", "--scheme", "conv-par", "--checkpoint", "none.pth"], 1, "no checkpoint at none.pth", None),
    ],
)
def test_insert_names_what_is_wrong(arguments: list[str], code: int, said: str, hint: str | None, here: Path) -> None:
    check_refused(run("insert", *arguments), code, said, hint=hint)
    assert files_below(here) == {}


def test_an_existing_output_is_kept(adapter: Path, fresh: bytes) -> None:
    for arguments in (["insert", *BASE], ["export", "-o", adapter], ["export", "--onnx", "-o", adapter]):
        check_refused(run(*arguments), 2, "exists", hint="--force")
    assert adapter.read_bytes() == fresh
    assert run("insert", *BASE, "--force", "-q", "--gamma", "8").code == 0
    assert adapter.read_bytes() != fresh


# --- adapter files --------------------------------------------------------------------------------------------------


def test_a_missing_adapter(imgs: Path) -> None:
    for arguments in (["train", imgs], ["eval", imgs], ["export"], ["merge-report"]):
        check_refused(run(*arguments), 1, "no adapter at 'adapter.safetensors'", hint="cadapt insert")
        check_refused(run(*arguments, "-m", "no.safetensors"), 1, "no adapter at 'no.safetensors'", hint="-m FILE")


def _flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: _flip(data, len(data) - 5),
        lambda data: _flip(data, 300),
        lambda data: _flip(data, 1),
        lambda data: b"",
        lambda data: b"not an adapter",
    ],
    ids=["half", "last byte", "tensor bit", "header bit", "length bit", "empty", "text"],
)
def test_a_damaged_adapter(spoil: Callable[[bytes], bytes], imgs: Path, trained: bytes, here: Path) -> None:
    bad = here / "bad.safetensors"
    bad.write_bytes(spoil(trained))
    before = files_below(here)
    for arguments in (["train", imgs, *FAST], ["eval", imgs], ["export"], ["export", "--onnx"], ["merge-report"]):
        check_refused(run(*arguments, "-m", bad, "-q"), 4, "bad.safetensors")
    assert files_below(here) == before


def test_an_untrained_adapter_has_nothing_to_show(adapter: Path, imgs: Path) -> None:
    for arguments in (["eval", imgs], ["export", "--onnx"], ["export", "--timm"], ["merge-report", "--data", imgs]):
        check_refused(run(*arguments), 1, "was not trained", hint="cadapt train DATA")


def test_another_base_or_architecture(imgs: Path, here: Path) -> None:
    for name, architecture, seed in (("own", "test_resnet", 1), ("other", "test_resnet", 2), ("wrong", "test_vit", 3)):
        torch.manual_seed(seed)
        save_file(timm.create_model(architecture).state_dict(), here / f"{name}.safetensors")
    made = run("insert", *BASE, "--checkpoint", "own.safetensors", "-q")
    assert made.code == 0, made.stderr
    assert run("train", imgs, *FAST, "-q").code == 0
    before = files_below(here)
    for arguments in (["train", imgs, *FAST], ["eval", imgs], ["export", "--onnx"], ["export", "--timm"]):
        for name in ("other", "wrong"):
            ran = run(*arguments, "-q", "--checkpoint", f"{name}.safetensors")
            check_refused(ran, 4, "wrong base", hint="--checkpoint FILE")
    assert files_below(here) == before


class _Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize("form", ["zip", "plain"])
def test_a_malicious_pickle_is_refused_and_does_not_run(form: str, here: Path) -> None:
    evil = here / "evil.pth"
    if form == "zip":
        torch.save({"conv1.weight": _Evil()}, evil)
    else:
        evil.write_bytes(pickle.dumps({"conv1.weight": _Evil()}, protocol=2))
    check_refused(run("insert", *BASE, "--checkpoint", evil), 4, "evil.pth is refused", hint="save_file")
    check_refused(run("inspect", evil), 4, "could run code", hint="save_file")
    assert [path.name for path in here.iterdir()] == ["evil.pth"]


# --- pictures -------------------------------------------------------------------------------------------------------


def _spoilt(kind: str) -> Path:
    folder = pets()
    if kind == "text":
        (folder / "cat" / "x.png").write_text("hello")
    elif kind == "truncated":
        picture(1, (60, 60)).save(folder / "cat" / "x.jpg")
        truncate(folder / "cat" / "x.jpg")
    elif kind == "empty":
        (folder / "cat" / "x.jpg").touch()
    elif kind == "bomb":
        Image.new("1", (30_000, 30_000)).save(folder / "cat" / "x.png")
    return folder


@pytest.mark.parametrize(
    ("kind", "said"),
    [("text", "not a picture"), ("truncated", "truncated"), ("empty", "0 bytes"), ("bomb", "too large to decode")],
)
def test_unreadable_pictures_stop_the_run_or_are_counted(kind: str, said: str, adapter: Path, fresh: bytes) -> None:
    folder = _spoilt(kind)
    check_refused(run("train", folder, *FAST), 4, "1 of 7 images cannot be read: pets/cat/x.", said, hint="--skip-bad")
    assert adapter.read_bytes() == fresh
    assert not list(Path().glob("runs/*"))
    skipped = run("train", folder, *FAST, "--skip-bad", "--json")
    assert len(skipped.json["data"]["skipped"]) == 1
    assert "1 unreadable" in skipped.stderr
    check_refused(run("eval", folder, "--workers", "0"), 4, "cannot be read", hint="--skip-bad")
    assert run("eval", folder, "--workers", "0", "--skip-bad", "--json").json["images"] == 6


def test_unusual_pictures_are_read(adapter: Path) -> None:
    folder = pets()
    picture(1).convert("CMYK").save(folder / "cat" / "cmyk.jpg")
    Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 160).save(folder / "cat" / "deep.png")
    picture(2).convert("P").save(folder / "dog" / "palette.png")
    picture(3).convert("RGBA").save(folder / "dog" / "transparent.png")
    ran = run("train", folder, *FAST, "--json", "--val-split", "0")
    assert ran.json["data"]["images"] == {"train": 10}
    assert run("eval", folder, "--workers", "0", "--json").json["images"] == 10


@pytest.mark.parametrize(
    ("make", "code", "said"),
    [
        (lambda: pets(cat=3), 4, "one class only"),
        (lambda: (pets() / "owl").mkdir(), 4, "no images in 1 of 3 class folders of 'pets': owl"),
        (lambda: (pets("pets/train"), pets("pets/val", cat=2, fox=2)), 4, "classes differ"),
        (lambda: Path("pets").mkdir(), 2, "no class subfolders"),
        (lambda: Path("pets").touch(), 2, "not a folder"),
        (lambda: Path("petz").mkdir(), 2, "no folder 'pets'"),
    ],
    ids=["one class", "empty class", "label mismatch", "no classes", "a file", "missing"],
)
def test_folders_that_are_no_data_set(make: Callable[[], object], code: int, said: str, adapter: Path) -> None:
    make()
    before = adapter.read_bytes()
    check_refused(run("train", "pets", *FAST), code, said)
    assert adapter.read_bytes() == before
    assert not list(Path().glob("runs/*"))


def test_data_of_other_classes(trained_adapter: Path, trained: bytes) -> None:
    folder = pets(fox=2, owl=2)
    check_refused(run("eval", folder, "--workers", "0"), 4, "none of the data's classes (fox, owl", hint="inspect")
    check_refused(run("train", folder, *FAST), 4, "other classes: the data lacks 'cat'", hint="--new-head")
    assert trained_adapter.read_bytes() == trained


def test_evaluation_names_the_classes_missing_on_either_side(trained_adapter: Path) -> None:
    ran = run("eval", pets(cat=2, fox=3), "--workers", "0", "--json")
    assert ran.json["missing_in_data"] == ["dog"]
    assert ran.json["unknown_to_model"] == ["fox"]
    assert ran.json["dropped_images"] == 3
    assert "no pictures of: dog" in run("eval", "pets", "--workers", "0").stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["export", "--onnx", "--dtype", "bf16"], "an ONNX file computes in fp32 or fp16, not in bf16"),
        (["export", "--onnx", "--dtype", "fp61"], "unknown dtype 'fp61'"),
        (["export", "--timm", "--dtype", "fp61"], "unknown dtype 'fp61'"),
        (["export", "--dtype", "fp61"], "unknown dtype 'fp61'"),
        (["eval", "imgs", "--device", "meta"], "'meta'"),
        (["eval", "imgs", "--device", "xpu"], "'xpu'"),
        (["eval", "imgs", "--precision", "fp61"], "unknown precision 'fp61'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_number_format_or_device_that_is_not_to_be_had(
    arguments: list[str], said: str, trained_adapter: Path, here: Path
) -> None:
    check_refused(run(*arguments), 2, said)
    assert [path.name for path in here.iterdir()] == ["adapter.safetensors"]


def test_training_says_that_it_leaves_the_test_part_alone(adapter: Path) -> None:
    pets("pets/train", cat=4, dog=4)
    pets("pets/test", cat=2, dog=2)
    ran = run("train", "pets", *FAST)
    assert ran.code == 0, ran.stderr
    assert "note: no val part beside test" in ran.stderr and "--val pets/test" in ran.stderr
    assert read_header(adapter).training["data"]["left_alone"] == "test"
