"""The stages of a sweep: what each asks of a worker, and the JSON lines in which it keeps what was answered."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.zoo.pool import Record, Task, run_pool

Records = dict[str, Record]


def prepare() -> None:
    """One thread, no warnings, and everything imported that the work needs."""
    import warnings

    import torch

    import tests.zoo.check  # noqa: F401

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def sites_work(name: str) -> Record:
    """The golden row of an architecture, or that it does not belong."""
    from tests.zoo.check import check_sites

    return check_sites(name)


def numbers_work(name: str, native: Mapping[str, int | str], plans: str) -> Record:
    """Numbers with real weights, plans written to a file; on the meta device where memory does not suffice."""
    from tests.zoo.check import check_numbers, check_on_meta, out_of_memory

    try:
        record = check_numbers(name, native)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        record = {}
    if not record:  # outside of the handler, which would keep the large model alive
        return check_on_meta(name)
    kept = {}
    for scheme, item in record["schemes"].items():
        if "plan" in item:
            kept[scheme] = {"plan": item.pop("plan"), "digest": item.pop("digest")}
    Path(plans).write_text(json.dumps(kept))
    return record


def rebuild_work(name: str, numbers: Mapping[str, Any], plans: str) -> Record:
    """Whether the plans in a file give this process the same models."""
    from tests.zoo.check import check_rebuild

    return check_rebuild(name, numbers, json.loads(Path(plans).read_text()))


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A folder in which a sweep goes on, and how it works."""

    folder: Path
    jobs: int = 2
    limit_gb: float = 11.0
    limit_seconds: float = 900.0
    say: Callable[[str], None] = print

    def records(self, stage: str) -> Records:
        """What a stage has finished; a line cut off by a kill is taken for unfinished."""
        found: Records = {}
        path = self._lines(stage)
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            found[record["name"]] = record
        return found

    def sites(self, names: Sequence[str]) -> None:
        """Find the sites of each architecture that was not done yet."""
        self._go("sites", sites_work, [(name, {}) for name in names])

    def numbers(self, names: Sequence[str]) -> None:
        """Run the numbers of each whose sites were found."""
        (self.folder / "plans").mkdir(parents=True, exist_ok=True)
        sites = self.records("sites")
        tasks = [
            (name, {"native": sites[name]["schemes"], "plans": str(self._plans(name))})
            for name in names
            if "schemes" in sites.get(name, {})
        ]
        self._go("numbers", numbers_work, tasks)

    def rebuild(self, names: Sequence[str]) -> None:
        """Rebuild what the numbers wrote down, in processes that are new."""
        numbers = self.records("numbers")
        tasks = [
            (name, {"numbers": {"setting": numbers[name]["setting"]}, "plans": str(self._plans(name))})
            for name in names
            if "setting" in numbers.get(name, {})
        ]
        self._go("rebuild", rebuild_work, tasks)

    def _lines(self, stage: str) -> Path:
        return self.folder / f"{stage}.jsonl"

    def _plans(self, name: str) -> Path:
        return self.folder / "plans" / f"{name}.json"

    def _go(self, stage: str, work: Callable[..., Record], tasks: Sequence[Task]) -> None:
        done = self.records(stage)
        left = [task for task in tasks if task[0] not in done]
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._lines(stage)
        cut = path.exists() and not path.read_text().endswith("\n")
        with path.open("a") as file:
            # a line that a kill cut off must not swallow the next
            file.write("\n" if cut else "")
            results = run_pool(
                work,
                left,
                jobs=self.jobs,
                limit_gb=self.limit_gb,
                limit_seconds=self.limit_seconds,
                prepare=prepare,
            )
            for count, record in enumerate(results, 1):
                file.write(json.dumps(record) + "\n")
                file.flush()
                self.say(f"{stage} {count}/{len(left)} {record['name']} {_outcome(record)}")


def _outcome(record: Record) -> str:
    if "error" in record:
        return str(record["error"])[:100]
    words = [f"{record['seconds']:.1f} s"] if "seconds" in record else []
    for scheme, item in record.get("schemes", {}).items():
        words += [f"{scheme} {item['status'] if isinstance(item, dict) else item}"[:40]]
    schemes = [item for item in record.get("schemes", {}).values() if isinstance(item, dict)]
    problems = [*record.get("problems", ()), *(text for item in schemes for text in item.get("problems", ()))]
    words += [str(problem)[:160] for problem in problems]
    words += [f"{scheme} differs in {parts}" for scheme, parts in record.get("differing", {}).items() if parts]
    return " · ".join(words)
