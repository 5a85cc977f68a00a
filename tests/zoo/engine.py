"""The engine on the zoo: a prepared model beside the plain one, for every scheme on one small model of each family.

``python -m tests.zoo.engine --output FILE`` writes a line of JSON for each case, and goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import warnings
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from cadapt.frozen import MEMORIES, Memory
from tests.zoo.census import architectures, family_of, make_on_meta
from tests.zoo.engine_case import TOLERANCES, Record, case_name, check, count_parameters
from tests.zoo.golden import read_golden

SCHEMES = (
    *("conv-par", "conv-seq", "res-seq", "lora", "ssf", "norm", "bias"),
    *("convpass", "consolidator", "iconformer", "vpt", "tinytl", "full", "linear"),
)
Case = tuple[str, str, list[Memory]]


def main(arguments: list[str] | None = None) -> int:
    """Try the cases asked for that the file does not hold, and return 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.engine", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the file of lines")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--memory", nargs="+", default=list(MEMORIES), choices=MEMORIES)
    parser.add_argument("--turn", action="store_true", help="give each scheme one of the memory settings, in turn")
    parser.add_argument("--precision", choices=TOLERANCES, default="fp64")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help="architectures or families")
    parser.add_argument("--count", type=int, help="of architectures, the small ones first")
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    failed = 0
    names = members(given.only)[: given.count]
    for record in sweep(list(cases(names, given.schemes, given.memory, given.turn)), given.precision, given.output):
        failed += record["status"] == "FAILED"
        print(in_short(record), file=sys.stderr, flush=True)
    return 1 if failed else 0


def members(globs: list[str]) -> list[str]:
    """The smallest architecture of each family of timm, or all that a glob names in full; small ones first."""
    known = set(architectures())
    named = [name for name in globs if name in known]
    golden = read_golden()
    families: dict[str, list[str]] = collections.defaultdict(list)
    for name in architectures():
        if not name.startswith("test_") and any(fnmatchcase(family_of(name), glob) for glob in globs):
            families[family_of(name)].append(name)
    sizes: dict[str, float] = {}
    for names in families.values():
        listed = {name: float(golden[name]["parameters_m"]) for name in names if name in golden}
        found = listed or {name: count_parameters(make_on_meta(name)) / 1e6 for name in names}
        smallest = min(found, key=lambda name: found[name])
        sizes[smallest] = found[smallest]
    return list(dict.fromkeys([*named, *sorted(sizes, key=lambda name: sizes[name])]))


def cases(names: list[str], schemes: list[str], memories: list[Memory], turn: bool) -> Iterator[Case]:
    """Every scheme on every architecture, under all memory settings or the one whose turn it is."""
    for row, name in enumerate(names):
        for column, scheme in enumerate(schemes):
            chosen = [memories[(row + column) % len(memories)]] if turn else memories
            yield name, scheme, chosen


def sweep(todo: list[Case], precision: str, path: Path) -> Iterator[Record]:
    """Yield the record of each case that a file does not hold, when its line was written."""
    text = path.read_text() if path.exists() else ""
    done = set()
    for line in text.splitlines():
        try:
            done.add(json.loads(line)["name"])
        except json.JSONDecodeError:  # cut off by a kill
            continue
    with path.open("a") as file:
        # a line that a kill cut off must not swallow the next
        file.write("\n" if text and not text.endswith("\n") else "")
        for name, scheme, memories in todo:
            left = [memory for memory in memories if case_name(name, scheme, memory, precision) not in done]
            for record in check(name, scheme, left, precision) if left else ():
                file.write(json.dumps(record) + "\n")
                file.flush()
                yield record


def in_short(record: Record) -> str:
    """A case in one line."""
    words = [record["name"], record["status"]]
    if "error" in record:
        words += [f"{record['error']:.0e}", f"kept {record['kept']:.2f}", f"{record['seconds']} s"]
    words += [*record.get("problems", ()), *record.get("notes", ()), record.get("reason", "")]
    return " · ".join(filter(None, words))


if __name__ == "__main__":
    sys.exit(main())
