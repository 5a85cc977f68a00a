"""Every scheme on every architecture, in a folder where a killed run goes on: ``python -m tests.zoo.sweep --out DIR``.

``CADAPT_UPDATE_GOLDEN=1`` looks at all of timm, and writes what it finds into the golden table.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import timm
import torch

import cadapt
from tests.zoo.census import architectures
from tests.zoo.golden import read_golden, row_of, update_golden, updating
from tests.zoo.stages import Sweep
from tests.zoo.summary import write_reports

STAGES = ("sites", "numbers", "rebuild")


def main(arguments: list[str] | None = None) -> None:
    """Run the stages asked for, then write the reports."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.sweep", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the sweep's folder")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help="architectures")
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--memory", type=float, default=11.0, help="GB that one process may hold")
    parser.add_argument("--seconds", type=float, default=900.0, help="that one architecture may take")
    parser.add_argument("--report", action="store_true", help="only write the reports again")
    given = parser.parse_args(arguments)
    # what another state of the code found says nothing of this one
    sweep = Sweep(
        folder=given.out / fingerprint(), jobs=given.jobs, limit_gb=given.memory, limit_seconds=given.seconds, say=_say
    )
    if not given.report:
        run(sweep, chosen(given.only), STAGES if given.stage == "all" else (given.stage,))
    print(write_reports(sweep))


def fingerprint() -> str:
    """Eight digits of a hash of cadapt's sources, of the checks, and of the versions of torch and timm."""
    digest = hashlib.sha256(f"{torch.__version__} {timm.__version__}".encode())
    for package in (Path(cadapt.__file__).parent, Path(__file__).parent):
        for path in sorted(package.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def chosen(globs: list[str]) -> list[str]:
    """The architectures of the golden table, or all of timm's while it is written, that match a glob.

    The small ones go first: a run that is cut short has seen most of them.
    """
    golden = read_golden()
    names = architectures() if updating() or not golden else tuple(golden)
    matching = [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]
    return sorted(matching, key=lambda name: float(golden[name]["parameters_m"]) if name in golden else 0.0)


def run(sweep: Sweep, names: list[str], stages: tuple[str, ...] = STAGES) -> None:
    """Run stages one after another over all names."""
    if "sites" in stages:
        sweep.sites(names)
        if updating():
            found = sweep.records("sites")
            update_golden(row_of(found[name]) for name in names if found[name].get("kind"))
    if "numbers" in stages:
        sweep.numbers(names)
    if "rebuild" in stages:
        sweep.rebuild(names)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
