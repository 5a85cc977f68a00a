"""What the tests of the command line share: a folder of pictures, an adapter, a trained one, each made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.program import run
from tests.data.pictures import make_classes

BASE = ("test_resnet", "--no-pretrained", "--img-size", "32", "--scheme", "conv-par")
FAST = ("--epochs", "1", "--batch-size", "8", "--workers", "0", "--augment", "none", "--device", "cpu")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared-with-a-name-to-look-for")


@pytest.fixture(scope="session")
def imgs(shared: Path) -> Path:
    """Two classes of six pictures."""
    return make_classes(shared / "imgs", {"cat": 6, "dog": 6}, (20, 18))


@pytest.fixture(scope="session")
def fresh(shared: Path) -> bytes:
    """The bytes of an adapter that was never trained."""
    path = shared / "fresh.safetensors"
    assert run("insert", *BASE, "-o", path, "-q").code == 0
    return path.read_bytes()


@pytest.fixture(scope="session")
def trained(shared: Path, imgs: Path, fresh: bytes) -> bytes:
    """The bytes of an adapter trained for one epoch."""
    path, output = shared / "for-training.safetensors", shared / "trained.safetensors"
    path.write_bytes(fresh)
    ran = run("train", imgs, "-m", path, *FAST, "-o", output, "--run", shared / "run", "-q")
    assert ran.code == 0, ran.stderr
    return output.read_bytes()


@pytest.fixture
def adapter(here: Path, fresh: bytes) -> Path:
    """An untrained adapter where commands look for one."""
    path = here / "adapter.safetensors"
    path.write_bytes(fresh)
    return path


@pytest.fixture
def trained_adapter(here: Path, trained: bytes) -> Path:
    """A trained adapter where commands look for one."""
    path = here / "adapter.safetensors"
    path.write_bytes(trained)
    return path
