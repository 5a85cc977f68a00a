"""The zoo by sample: one architecture of every other family against the golden table, and light ones by numbers.

``CADAPT_ZOO_SEED`` chooses the sample, else the date. ``--zoo full`` sweeps all architectures, into the folder that
``CADAPT_ZOO_OUT`` names, where a run that was stopped goes on.
"""

from __future__ import annotations

import collections
import datetime
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cadapt.adapted import AdaptedModel
from cadapt.surgery import operate
from tests.zoo import check, lively
from tests.zoo.census import kind_of, make_on_meta
from tests.zoo.check import check_numbers, check_rebuild, check_sites
from tests.zoo.golden import Row, differences, read_golden, row_of, update_golden, updating
from tests.zoo.livened import wake
from tests.zoo.misbehaving import misbehave
from tests.zoo.pool import run_pool
from tests.zoo.setting import SCHEMES
from tests.zoo.stages import Sweep
from tests.zoo.summary import judge
from tests.zoo.sweep import chosen, fingerprint, run, write_reports

# so that half of the families, which is a day's share, take half a minute
_SITES_M, _NUMBERS_M = 30.0, 12.0
_NUMBERS_FAMILIES = 3


def seed() -> int:
    return int(os.environ.get("CADAPT_ZOO_SEED") or datetime.datetime.now(datetime.UTC).date().toordinal())


def by_family(limit_m: float) -> dict[str, list[Row]]:
    """Rows of each family up to a size, or its lightest alone."""
    families: dict[str, list[Row]] = collections.defaultdict(list)
    for row in read_golden().values():
        families[row["family"]].append(row)
    return {
        family: [row for row in rows if float(row["parameters_m"]) <= limit_m]
        or [min(rows, key=lambda row: float(row["parameters_m"]))]
        for family, rows in sorted(families.items())
    }


def sites_sample() -> list[str]:
    choice = random.Random(seed())
    return [choice.choice(rows)["name"] for rows in by_family(_SITES_M).values()]


def numbers_sample() -> list[str]:
    """Light ones of some families; days in a row take one family after the other."""
    families = list(by_family(_NUMBERS_M).items())
    turn = seed() * _NUMBERS_FAMILIES
    taken = [families[(turn + step) % len(families)] for step in range(_NUMBERS_FAMILIES)] if families else []
    lightest = [sorted(rows, key=lambda row: float(row["parameters_m"]))[:3] for _, rows in taken]
    return [random.Random(seed()).choice(rows)["name"] for rows in lightest]


@pytest.mark.in_turn(2)
@pytest.mark.filterwarnings("default")  # timm's own
@pytest.mark.parametrize("name", sites_sample())
def test_sites_are_those_of_the_golden_table(name: str) -> None:
    record = check_sites(name)
    if updating():
        update_golden([row_of(record)])
    assert not differences(record, read_golden()[name])


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", numbers_sample())
def test_every_scheme_leaves_the_base_alone_and_trains_all_it_plans(name: str) -> None:
    sites = check_sites(name)
    numbers = check_numbers(name, sites["schemes"])
    plans = json.loads(json.dumps({scheme: item for scheme, item in numbers["schemes"].items() if "plan" in item}))
    records = {
        "sites": {name: sites},
        "numbers": {name: numbers},
        "rebuild": {name: check_rebuild(name, numbers, plans)},
    }
    verdicts = {scheme: judge(name, scheme, records) for scheme in SCHEMES}
    assert {scheme: verdict for scheme, verdict in verdicts.items() if verdict[0] not in ("passed", "refused")} == {}


def _awake(model: AdaptedModel) -> None:
    wake(model.adapters)


def _other_base(model: AdaptedModel) -> None:
    # the head stands in for this layer, so that no output tells
    model.get_submodule("fc").bias.data += 1


def _cut(model: AdaptedModel) -> None:
    next(model.adapters.parameters()).requires_grad_(False)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(_awake, "eval differs by"), (_other_base, "1 base tensors changed"), (_cut, "planned tensors without gradient")],
)
def test_the_check_sees_what_is_wrong(
    spoil: Callable[[AdaptedModel], None], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(*given: Any) -> AdaptedModel:
        model = operate(*given)
        spoil(model)
        return model

    monkeypatch.setattr(check, "operate", spoilt)
    seen = check.check_numbers("test_resnet", check_sites("test_resnet")["schemes"])
    assert all(item["status"] == "failed" for item in seen["schemes"].values())
    assert all(any(words in problem for problem in item["problems"]) for item in seen["schemes"].values())


def test_the_check_sees_adapters_that_read_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter that is given something else is as silent at insertion as one that is right."""

    def spoilt(*given: Any) -> AdaptedModel:
        model = operate(*given)
        delta = next(node for node in model.graph.nodes if str(node.target).startswith("adapters."))
        source = delta.args[0]
        with model.graph.inserting_before(delta):
            delta.args = (model.graph.call_function(torch.neg, (source,)),)
        model.__setstate__(model.__getstate__())
        return model

    monkeypatch.setattr(check, "operate", spoilt)
    seen = check.check_numbers("test_resnet", check_sites("test_resnet")["schemes"])
    for scheme in SCHEMES:
        assert any("hooks on the base differ" in problem for problem in seen["schemes"][scheme]["problems"]), scheme


def test_the_whole_zoo(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("zoo") != "full":
        pytest.skip("--zoo full sweeps all architectures, for hours")
    default = request.config.rootpath / ".pytest_cache" / "zoo"
    sweep = Sweep(folder=Path(os.environ.get("CADAPT_ZOO_OUT") or default) / fingerprint(), jobs=os.cpu_count() or 1)
    run(sweep, chosen(["*"]))
    write_reports(sweep)
    stages = {stage: sweep.records(stage) for stage in ("sites", "numbers", "rebuild")}
    failed = {
        f"{name} {scheme}": reason
        for name in read_golden()
        for scheme in SCHEMES
        for word, reason in [judge(name, scheme, stages)]
        if word not in ("passed", "refused", "on meta")
    }
    changed = {name: gap for name, row in read_golden().items() if (gap := differences(stages["sites"][name], row))}
    assert (failed, changed) == ({}, {})


def test_every_family_has_its_turn_in_both_samples() -> None:
    families = {row["family"] for row in read_golden().values()}
    assert {read_golden()[name]["family"] for name in sites_sample()} == families
    order = sorted(families)
    turns = {
        order[(turn * _NUMBERS_FAMILIES + step) % len(order)]
        for turn in range(len(order))
        for step in range(_NUMBERS_FAMILIES)
    }
    assert turns == families


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("resnet18", "convnet"),
        ("vgg11", "convnet"),
        ("nasnetalarge", "convnet"),
        ("resnet50_clip", "convnet"),  # an attention pool is no attention of the backbone
        ("skresnet18", "convnet"),  # nor is a choice between branches
        ("vit_small_r26_s32_224", "hybrid"),
        ("mobilevitv2_050", "hybrid"),
        ("poolformer_s12", None),
        ("levit_128s", None),
        ("vit_tiny_patch16_224", None),
    ],
)
def test_the_census(name: str, kind: str | None) -> None:
    assert kind_of(make_on_meta(name)) == kind


def test_lively_weights_are_the_same_each_time_and_leave_buffers_alone() -> None:
    first, again = (lively.make_lively("test_resnet", {}).state_dict() for _ in range(2))
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    with torch.random.fork_rng(devices=[]):
        import timm

        fresh = timm.create_model("swinv2_tiny_window8_256")
    alive = lively.make_lively("swinv2_tiny_window8_256", {})
    buffers = dict(alive.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in fresh.named_buffers())
    assert not [
        name for name, value in alive.named_parameters() if not bool(value.any()) or not bool(value.isfinite().all())
    ]


def test_a_worker_that_dies_or_hangs_fails_its_architecture_only() -> None:
    tasks = [(name, {"value": 1}) for name in ("first", "dies", "fails", "hangs", "last")]
    records = {item["name"]: item for item in run_pool(misbehave, tasks, jobs=1, limit_gb=8.0, limit_seconds=5.0)}
    assert records["first"] == {"name": "first", "value": 1}
    assert records["last"] == {"name": "last", "value": 1}
    assert "exit code 3" in records["dies"]["error"]
    assert records["fails"]["error"] == "ValueError: no such layer"
    assert "took over 5 s" in records["hangs"]["error"]


def test_a_sweep_goes_on_behind_a_line_that_was_cut_off(tmp_path: Path) -> None:
    said: list[str] = []
    sweep = Sweep(folder=tmp_path, jobs=1, say=said.append)
    (tmp_path / "sites.jsonl").write_text('{"name": "test_resnet", "kind": "convnet"}\n{"name": "test_con')
    sweep.sites(["test_resnet", "test_convnext"])
    assert [line.split()[2] for line in said] == ["test_convnext"]
    assert sweep.records("sites")["test_convnext"]["kind"] == "convnet"
    assert sweep.records("sites")["test_resnet"] == {"name": "test_resnet", "kind": "convnet"}
