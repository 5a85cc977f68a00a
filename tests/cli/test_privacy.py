"""Nothing that is given away says where on somebody's machine it was made."""

from __future__ import annotations

import getpass
import platform
from pathlib import Path

import pytest
import timm
from safetensors.torch import save_file

from tests.cli.conftest import FAST
from tests.cli.program import run


def traces(content: bytes, *paths: Path) -> list[str]:
    """What in a file's bytes tells of this machine: the given paths, this source tree, the home folder, the host."""
    told = {
        *map(str, paths),
        str(Path(__file__).parents[2]),
        platform.node(),
        f"/{getpass.getuser()}/",
        "site-packages",
    }
    told |= {str(path.parent) for path in paths}
    return sorted(item for item in told if len(item) > 3 and item.encode() in content)


@pytest.mark.parametrize("scheme", ["conv-par", "linear"])
def test_no_local_path_in_any_file(scheme: str, here: Path, imgs: Path) -> None:
    weights = here / "weights" / "base.safetensors"
    weights.parent.mkdir()
    save_file(timm.create_model("test_resnet").state_dict(), weights)
    output = here / "a.safetensors"
    made = run("insert", "test_resnet", "--checkpoint", weights, "--img-size", "32", "--scheme", scheme, "-o", output)
    assert made.code == 0, made.stderr
    run_folder = here / "run"
    ran = run("train", imgs, *FAST, "-m", output, "--run", run_folder, "--val", imgs, "--checkpoint", weights)
    assert ran.code == 0, ran.stderr
    exports = [["--dtype", "fp16"], ["--onnx"]] + ([["--timm"]] if scheme == "linear" else [])
    written = [output, run_folder / "best.safetensors", run_folder / "last.safetensors"]
    for arguments in exports:
        ran = run("export", "-m", output, *arguments)
        assert ran.code == 0, ran.stderr
        written.append(Path(ran.line))
    for path in written:
        assert traces(path.read_bytes(), here, imgs, weights) == [], path.name


def test_the_search_finds_what_it_looks_for(here: Path, imgs: Path) -> None:
    assert str(imgs) in traces(b"data: " + str(imgs / "cat").encode(), here, imgs)
