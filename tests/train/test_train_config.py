from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields

import pytest

from cadapt.errors import RefusedError, UsageError
from cadapt.train import TrainConfig
from cadapt.train.config import _RULES


def test_round_trip_through_json():
    config = TrainConfig(epochs=3, lr=0.1 + 0.2, ema=0.99, clip_grad=1.0, precision="bf16", keep="last")
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_every_setting_is_checked():
    assert set(_RULES) == {item.name for item in fields(TrainConfig)}


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"epochs": 1.5},
        {"epochs": True},
        {"batch_size": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"lr": "1"},
        {"weight_decay": -1.0},
        {"min_lr": -1.0},
        {"min_lr": 1.0, "lr": 0.1},
        {"warmup_epochs": -1},
        {"clip_grad": 0.0},
        {"label_smoothing": 1.0},
        {"mixup": -0.1},
        {"ema": 1.0},
        {"precision": "fp8"},
        {"device": ""},
        {"accumulate": 0},
        {"seed": -1},
        {"compile": 1},
        {"keep": "first"},
        {"log_every_steps": 0},
        {"save_every_seconds": float("inf")},
    ],
)
def test_nonsense_is_a_usage_error_that_names_the_setting(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        TrainConfig(**wrong)


def test_a_damaged_record_is_refused():
    with pytest.raises(RefusedError, match="epochs"):
        TrainConfig.from_json({"epochs": -1})
    with pytest.raises(RefusedError, match="epoch_count") as caught:
        TrainConfig.from_json({"epoch_count": 1})
    assert caught.value.hint


def test_the_settings_need_no_torch():
    code = "import sys, cadapt.train; cadapt.train.TrainConfig(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
