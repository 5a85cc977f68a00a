"""What terminal and page say alike of one adapter of a merge."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cadapt.merging.report import SiteMerge


def size_of(row: SiteMerge) -> float | None:
    """‖Δ‖/‖h‖ on real pictures, where it was measured there, else on random input."""
    return row.effect if row.relative_size is None else row.relative_size


def reason_of(row: SiteMerge) -> str:
    """Why its status is what it is, what else changed for it, and the layers that a fitted kernel went into."""
    # an exact merge is into the site's own layer, which needs no telling
    hosts = f"into {', '.join(row.hosts)}" if row.status == "fitted" and row.hosts else ""
    return "; ".join(filter(None, (row.reason, row.note, hosts)))
