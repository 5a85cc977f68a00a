"""The collector rests while torch is imported, and only then."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from cadapt.cli._imports import collector_paused


def test_it_rests_for_a_first_import_and_works_again_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    frozen = gc.get_freeze_count()
    try:
        with pytest.raises(ImportError), collector_paused():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled()
        with collector_paused():
            pass
        assert gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()


def test_it_goes_on_where_torch_is_there() -> None:
    frozen = gc.get_freeze_count()
    with collector_paused():
        assert gc.isenabled()
    assert gc.get_freeze_count() == frozen


def test_nothing_is_left_frozen_when_the_process_ends() -> None:
    """What is frozen then counts as leaked: triton's bindings would tell of hundreds after each training."""
    code = """
import atexit, gc
from cadapt.cli._imports import collector_paused
atexit.register(lambda: print(frozen, gc.get_freeze_count()))
with collector_paused():
    pass
frozen = gc.get_freeze_count() > 0
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "True 0\n"
