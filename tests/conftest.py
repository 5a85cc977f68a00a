"""What all tests share: no network, a cache of their own, one thread, turns, and no search through what stays."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any test imports the hub's client

import gc
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.turns import MARKER, take_turns, today


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--zoo",
        default="sample",
        help="Real models: sample, full (every architecture, and 15 at 224 px), or some of the 15 by name.",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARKER)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # as a script's shell starts what it sends to the background; the processes of tests would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("zoo") == "full" or any("::" in argument for argument in config.args):
        return
    items[:], others = take_turns(items, today())
    if others:
        config.hook.pytest_deselected(items=others)


@pytest.fixture(scope="module", autouse=True)
def survivors_set_aside() -> Iterator[None]:
    """What a file of tests leaves is in caches, as imports are: no later collection looks through it."""
    gc.freeze()
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def survivors_let_go() -> Iterator[None]:
    """Libraries that look for leaks when the process ends would find, and tell, hundreds of objects set aside."""
    yield
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Keep the index of known checkpoints out of the user's own cache folder."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    yield folder
