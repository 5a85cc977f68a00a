"""Work for the pool's test: it dies, fails, hangs, or is done. In a file of its own, which is imported in no time."""

from __future__ import annotations

import os
import time
from typing import Any


def misbehave(name: str, **arguments: Any) -> dict[str, Any]:
    """Do what the name says, or return the arguments."""
    if name == "dies":
        os._exit(3)
    if name == "fails":
        raise ValueError("no such layer")
    if name == "hangs":
        time.sleep(60)
    return {"name": name, **arguments}
