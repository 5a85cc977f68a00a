"""``fit`` as a library's user calls it: without the arguments that the command line gives."""

from __future__ import annotations

import json

import torch
from safetensors import safe_open

from cadapt.train import RunFolder, TrainConfig, fit

from .runs import make_data, make_model

CONFIG = TrainConfig(epochs=2, batch_size=4, lr=1e-2, warmup_epochs=0, device="cpu")


def test_a_library_user_needs_no_more_than_model_data_and_settings(tmp_path):
    model, other = make_model(), make_model()
    assert fit(model, make_data(), CONFIG).epochs == 2
    result = fit(other, make_data(), CONFIG, run=RunFolder(path=tmp_path / "run"))
    with safe_open(tmp_path / "run" / "best.safetensors", framework="pt") as file:
        record = json.loads(file.metadata()["training"])
        best = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert record["epochs"] == result.best_epoch
    assert best.keys() == {name for name in other.state_dict() if not name.startswith("conv.")}
    for name, tensor in best.items():
        assert torch.equal(tensor, model.state_dict()[name]), name
        assert torch.equal(tensor, other.state_dict()[name]), name
