"""The collector rests while torch is imported, and only then."""

from __future__ import annotations

import gc
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
