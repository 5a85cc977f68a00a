"""Imports torch and timm in less time. Imports neither itself."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Let no garbage be collected while modules are imported, nor what they brought be looked through ever again.

    Half a million objects come and none goes, yet each next generation of them would be searched: a sixth of the time
    that torch and timm take. What is left out of later collections also stays shared with forked readers.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
        # else libraries that look for leaks when the process ends would find, and tell, hundreds
        atexit.register(gc.unfreeze)
    finally:
        gc.enable()
