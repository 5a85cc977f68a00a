"""The engine on the zoo by sample: some schemes a day on timm's tiny architectures, one memory setting each.

``CADAPT_ZOO_SEED`` chooses the sample, else the date. ``--zoo full`` sweeps a model of every family under all schemes
and settings, into the folder that ``CADAPT_ZOO_OUT`` names. Spoilt engines show that a case would notice.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cadapt.frozen import MEMORIES, prepare
from tests.zoo import engine_case
from tests.zoo.census import architectures
from tests.zoo.engine import SCHEMES, cases, in_short, members, sweep
from tests.zoo.engine_case import case_name, check
from tests.zoo.sweep import fingerprint

_CASES_A_DAY = 3
_TINY = [name for name in architectures() if name.startswith("test_")]


def sample(day: int) -> list[tuple[str, str, str]]:
    """Days in a row take one architecture after the other; schemes and settings move on with the turns."""
    turns = range(day * _CASES_A_DAY, (day + 1) * _CASES_A_DAY)
    return [
        (
            _TINY[turn % len(_TINY)],
            SCHEMES[(turn // len(_TINY) + turn) % len(SCHEMES)],
            MEMORIES[(turn // len(_TINY) // len(SCHEMES) + turn) % len(MEMORIES)],
        )
        for turn in turns
    ]


def today() -> int:
    return int(os.environ.get("CADAPT_ZOO_SEED") or datetime.datetime.now(datetime.UTC).date().toordinal())


@pytest.mark.filterwarnings("default")  # timm's own
@pytest.mark.parametrize(("name", "scheme", "memory"), sample(today()))
def test_a_prepared_model_takes_the_plain_one_s_steps(name: str, scheme: str, memory: Any) -> None:
    (record,) = check(name, scheme, [memory])
    assert record["status"] in ("ok", "refused"), in_short(record)


@pytest.mark.filterwarnings("default")
def test_the_kernels_of_single_precision() -> None:
    """Some are for that precision alone."""
    (record,) = check("test_resnet", "conv-par", ["low"], "fp32")
    assert record["status"] == "ok", in_short(record)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("name", "scheme", "memory"),
    [
        # an MLP over positions, which no picture enters, draws between what a segment draws
        ("swinv2_cr_tiny_224", "conv-par", "min"),
        # a number of many digits behind each activation is folded
        ("nf_regnet_b0", "conv-par", "fast"),
    ],
)
def test_what_the_sweep_found(name: str, scheme: str, memory: Any) -> None:
    (record,) = check(name, scheme, [memory])
    assert record["status"] == "ok", in_short(record)


class _Spoilt(nn.Module):
    """A prepared model with a fault."""

    def __init__(self, model: nn.Module, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.trained = (next(item for item in model.parameters() if item.requires_grad),)

    def train(self, mode: bool = True) -> nn.Module:
        self.inner.train(mode)
        return super().train(mode)


class _Scaled(_Spoilt):
    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x) * (1 + 1e-8)


class _Cut(_Spoilt):
    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x).detach() + 0 * self.trained[0].sum()


class _Hoarding(_Spoilt):
    """Keeps what a gradient of nothing needs."""

    def forward(self, x: torch.Tensor) -> Any:
        pictures = x.detach().repeat(64, 1, 1, 1)
        return self.inner(x) + 0 * (pictures * self.trained[0].sum()).sum()


class _Fixed(_Spoilt):
    """Has no other mode than the first."""

    def train(self, mode: bool = True) -> nn.Module:
        return self

    def forward(self, x: torch.Tensor) -> Any:
        self.inner.train()
        return self.inner(x)


class _Falling(_Spoilt):
    def forward(self, x: torch.Tensor) -> Any:
        raise RuntimeError("no such operator")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_Scaled, "off by"),
        (_Cut, "no gradient"),
        (_Hoarding, "bytes of each picture"),
        (_Fixed, "eval: loss"),
        (_Falling, "no such operator"),
    ],
)
def test_the_check_sees_what_is_wrong(
    spoil: Callable[[nn.Module, nn.Module], nn.Module], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_case, "prepare", lambda model, **given: spoil(model, prepare(model, **given)))
    (record,) = check("test_resnet", "conv-par", ["fast"])
    assert record["status"] == "FAILED"
    assert any(words in problem for problem in record["problems"]), record["problems"]


def test_a_sweep_goes_on_behind_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    done = case_name("test_resnet", "linear", "fast", "fp64")
    path.write_text(json.dumps({"name": done, "status": "ok"}) + '\n{"name": "test_resn')
    todo = list(cases(["test_resnet"], ["linear"], ["fast", "min"], turn=False))
    assert [record["name"] for record in sweep(todo, "fp64", path)] == ["test_resnet linear min fp64"]
    assert list(sweep(todo, "fp64", path)) == []
    assert json.loads(path.read_text().splitlines()[-1])["status"] == "ok"


def test_in_turn_every_architecture_meets_every_setting() -> None:
    todo = list(cases(["first", "second"], ["bias", "lora", "norm"], list(MEMORIES), turn=True))
    assert [memories for _, _, memories in todo] == [[MEMORIES[item]] for item in (0, 1, 2, 1, 2, 0)]


def test_every_family(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("zoo") != "full":
        pytest.skip("--zoo full sweeps a model of every family, for hours")
    default = request.config.rootpath / ".pytest_cache" / "zoo"
    folder = Path(os.environ.get("CADAPT_ZOO_OUT") or default) / "engine" / fingerprint()
    folder.mkdir(parents=True, exist_ok=True)
    todo = list(cases(members(["*"]), list(SCHEMES), list(MEMORIES), turn=False))
    list(sweep(todo, "fp64", folder / "cases.jsonl"))
    records = [json.loads(line) for line in (folder / "cases.jsonl").read_text().splitlines()]
    assert [in_short(record) for record in records if record["status"] == "FAILED"] == []
    assert len(records) == len(todo) * len(MEMORIES)
