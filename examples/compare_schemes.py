"""Compare every scheme on two small backbones and one data set: trained parameters against accuracy over seeds.

Each scheme that fits a backbone learns scikit-learn's digits (``make_digits.py``) from a ConvNet and from a ViT that
know printed letters only, with its default settings, each for the same number of epochs. The learning rate is searched
for each scheme alike: the first seed trains with each of a few, and the one that does best on the validation split is
kept for all seeds. The test split is looked at when nothing is left to choose.

Finished runs are kept as JSON lines in the output folder and skipped when it is called again; a broken scheme is named
at the end, and does not stop the others. Written beside them: the table as Markdown, CSV and JSON, and its plot.

    pip install -e '.[plot]' scikit-learn && python examples/compare_schemes.py -o comparison
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import timm
import torch
from glyph_backbones import BACKBONES, WEIGHTS_FOLDER
from scheme_runs import Budget, Job
from scheme_store import Runs, run_all
from scheme_table import Row, choose_lr, make_rows, to_markdown, write_csv, write_json

import cadapt
from cadapt.adapters import get_schemes

JOINED = ("conv-par+norm", "consolidator+bias+norm")
"""Schemes that the papers join; they are compared where all their parts are known."""

FAST = {"schemes": ["linear", "norm", "conv-par"], "seeds": 1, "lr": [1e-3], "epochs": 1, "limit": 64, "jobs": 1}

SEARCH_SEED = 0


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("comparison"), help="folder for runs, table and plot")
    parser.add_argument("--data", type=Path, help="folder with train/, val/ and test/ (default: OUTPUT/digits, made)")
    parser.add_argument("--weights", type=Path, default=WEIGHTS_FOLDER, help="folder of the backbones' weights")
    parser.add_argument("--backbones", nargs="+", choices=list(BACKBONES), default=list(BACKBONES), metavar="NAME")
    parser.add_argument("--schemes", nargs="+", metavar="NAME", help="default: all, and those that the papers join")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each scheme")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 5e-3, 2.5e-2], help="the rates to choose from")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--limit", type=int, help="about how many pictures to take of each split (default: all)")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="runs at once")
    parser.add_argument(
        "--fast", action="store_true", help="a trial of everything in seconds, whose figures mean nothing"
    )
    parser.add_argument("--set", action="append", default=[], metavar="SCHEME.KEY=VALUE", help="a setting of a scheme")
    parser.add_argument("--no-plot", action="store_true", help="leave out the plot, which needs matplotlib")
    arguments = parser.parse_args(argv)
    if arguments.fast:
        parser.set_defaults(**FAST)
        arguments = parser.parse_args(argv)
    if not arguments.no_plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("the plot needs matplotlib: pip install 'cadapt[plot]', or --no-plot")
    return arguments


def list_schemes(wanted: Sequence[str] | None) -> list[str]:
    """Return the schemes to compare: those asked for, or all that are known and their joins.

    Raises:
        UsageError: a scheme is unknown.
    """
    joined = [name for name in JOINED if set(name.split("+")) <= cadapt.SCHEMES.keys()]
    names = list(dict.fromkeys(wanted or [*cadapt.SCHEMES, *joined]))
    for name in names:
        get_schemes(name)
    return names


def settings_of(scheme: str, given: Iterable[str]) -> dict[str, str]:
    """Return the settings given as ``SCHEME.KEY=VALUE`` that a scheme, or a part of a joined one, takes."""
    pairs = (item.partition("=")[::2] for item in given)
    return {key: value for key, value in pairs if key.partition(".")[0] in scheme.split("+")}


def make_data(folder: Path) -> Path:
    """Write the digits into a folder that has none yet, and return it."""
    if not (folder / "test").is_dir():
        script = Path(__file__).with_name("make_digits.py")
        subprocess.run([sys.executable, script, folder], check=True, stdout=subprocess.DEVNULL)
    return folder


def plan_searches(arguments: argparse.Namespace, schemes: Sequence[str], data: Path) -> list[Job]:
    """Return the runs of the first seed, one for each learning rate."""
    budget = Budget(epochs=arguments.epochs, limit=arguments.limit)
    hashes = {name: _hash_weights(arguments.weights, name) for name in arguments.backbones}
    return [
        Job(
            backbone=backbone,
            scheme=scheme,
            seed=SEARCH_SEED,
            lr=lr,
            budget=budget,
            data=data,
            weights=arguments.weights,
            weights_sha256=hashes[backbone],
            settings=settings_of(scheme, arguments.set),
            merge=lr == min(arguments.lr),
        )
        for backbone in arguments.backbones
        for scheme in schemes
        for lr in arguments.lr
    ]


def _hash_weights(folder: Path, backbone: str) -> str:
    path = folder / BACKBONES[backbone].weights_name
    if not path.is_file():
        raise SystemExit(f"error: no weights {path}: --weights FOLDER, or make them with examples/pretrain_glyphs*.py")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def plan_seeds(searches: Sequence[Job], runs: Runs, seeds: int) -> list[Job]:
    """Return the further runs of every scheme at the learning rate that its search chose."""
    jobs = []
    for backbone, scheme in dict.fromkeys((job.backbone, job.scheme) for job in searches):
        own = [job for job in searches if (job.backbone, job.scheme) == (backbone, scheme)]
        lr = choose_lr(runs.find(own), SEARCH_SEED)
        if lr is not None:
            jobs += [replace(own[0], lr=lr, seed=seed, merge=False) for seed in range(SEARCH_SEED + 1, seeds)]
    return jobs


def describe_protocol(arguments: argparse.Namespace, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return as JSON how the table came about."""
    return {
        **asdict(Budget(epochs=arguments.epochs, limit=arguments.limit)),
        "lr_choices": sorted(arguments.lr),
        "seeds": arguments.seeds,
        "settings": arguments.set,
        "cadapt": cadapt.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "states_of_code": sorted({item["code"] for item in records}),
        "diverged_runs": sum(item["status"] == "diverged" for item in records),
    }


def to_notes(protocol: Mapping[str, Any]) -> list[str]:
    """Return the lines below the table: what was done, and what to mind."""
    rates = ", ".join(f"{lr:g}" for lr in protocol["lr_choices"])
    lines = [
        f"{protocol['epochs']} epochs of batches of {protocol['batch_size']}, no augmentation, the last epoch's "
        f"weights; mean ± sample deviation of {protocol['seeds']} seeds on the test split. The learning rate is the "
        f"best of {rates} on the validation split with seed {SEARCH_SEED}, searched for each scheme alike; schemes "
        "have their default settings. Trained parameters and % of the backbone's are without the head, which is the "
        "same in all; `merges` counts adapters and changed tensors that fold into the base; s is one run's training.",
    ]
    if protocol["limit"] is not None:
        lines.append(f"\nA trial on about {protocol['limit']} pictures of each split: the figures mean nothing.")
    if len(protocol["states_of_code"]) > 1:
        lines.append(f"\nThe runs were made by {len(protocol['states_of_code'])} states of the code.")
    return lines


def write_results(arguments: argparse.Namespace, rows: Sequence[Row], protocol: Mapping[str, Any]) -> None:
    """Write the table and the plot, and print the paths."""
    titles = {name: backbone.title for name, backbone in BACKBONES.items()}
    stem = arguments.output / "schemes"
    stem.with_suffix(".md").write_text(to_markdown(rows, titles, to_notes(protocol)), encoding="utf-8")
    write_csv(stem.with_suffix(".csv"), rows)
    write_json(stem.with_suffix(".json"), rows, protocol)
    written = [stem.with_suffix(suffix) for suffix in (".md", ".csv", ".json")]
    if not arguments.no_plot:
        import scheme_plot  # only here: matplotlib is an extra

        written += scheme_plot.save(scheme_plot.draw(rows, titles), stem)
    print(*written, sep="\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Make the runs that are missing, write the results, and return 1 if a scheme broke."""
    arguments = read_arguments(argv)
    try:
        schemes = list_schemes(arguments.schemes)
    except cadapt.CadaptError as error:
        raise SystemExit(f"error: {error.message} ({error.hint})") from error
    arguments.output.mkdir(parents=True, exist_ok=True)
    data = make_data(arguments.data or arguments.output / "digits")
    runs = Runs(arguments.output / "runs.jsonl")
    searches = plan_searches(arguments, schemes, data)
    run_all(searches, runs, arguments.jobs, "search")
    repeats = plan_seeds(searches, runs, arguments.seeds)
    run_all(repeats, runs, arguments.jobs, "seeds")
    records = runs.find([*searches, *repeats])
    rows = make_rows(records, range(SEARCH_SEED, arguments.seeds))
    write_results(arguments, rows, describe_protocol(arguments, records))
    broken = [row for row in rows if row.status in ("failed", "diverged")]
    for row in broken:
        print(f"error: {row.scheme} on {row.backbone} {row.status}: {row.reason}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
