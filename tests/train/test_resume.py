from __future__ import annotations

import json
import signal
from dataclasses import replace

import pytest
import torch

from cadapt.errors import InterruptedRunError, RefusedError, UsageError
from cadapt.train import FitData, RunFolder, Saved, fit

from .runs import CONFIG, Block, load_weights, make_data, make_model, run, run_in_process, save_weights

TIMES = {"images_per_second", "seconds"}


class Killed(BaseException):
    """Stands for a kill in this process: nothing of the engine's may catch it."""


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "run"
    run(folder)
    return folder


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def assert_same_run(folder, reference):
    assert metrics(folder) == metrics(reference)
    for name in ("best.safetensors", "last.safetensors"):
        (ours, our_record), (theirs, their_record) = load_weights(folder / name), load_weights(reference / name)
        assert our_record == their_record
        for key, tensor in theirs.items():
            assert torch.equal(ours[key], tensor), key


def test_the_reference_trains_and_moves_its_buffers(reference):
    fresh, last = make_model().state_dict(), load_weights(reference / "last.safetensors")[0]
    assert not torch.equal(fresh["adapter.weight"], last["adapter.weight"])
    assert not torch.equal(fresh["norm.running_mean"], last["norm.running_mean"])
    assert torch.equal(fresh["conv.weight"], last["conv.weight"])


@pytest.mark.parametrize("workers", [0, 2, 4])
def test_killed_between_two_writes_in_mid_epoch_and_resumed_in_fresh_processes(tmp_path, reference, workers):
    folder = tmp_path / "run"
    assert run_in_process(folder, workers, signals={9: "SIGKILL"}) == -signal.SIGKILL
    state = torch.load(folder / "state.pt", weights_only=True)
    assert (state["ledger"]["epoch"], state["ledger"]["step"]) == (1, 1)
    assert len((folder / "metrics.jsonl").read_bytes()) > state["metrics_bytes"]  # a line to be cut off
    assert run_in_process(folder, workers, resume=True, signals={4: "SIGKILL"}) == -signal.SIGKILL
    assert run_in_process(folder, workers, resume=True) == 0
    assert_same_run(folder, reference)


@pytest.mark.parametrize("saves", range(1, 22, 3))
def test_any_save_can_be_the_last(tmp_path, reference, saves):
    left = saves

    def kill_after(event):
        nonlocal left
        left -= isinstance(event, Saved)
        if left == 0:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "run", on_event=kill_after)
    model, result = run(tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", reference)
    assert result.steps == 18
    best, _ = load_weights(reference / "best.safetensors")
    assert all(torch.equal(tensor, best[name]) for name, tensor in model.state_dict().items())


def test_a_finished_run_resumes_to_its_result(tmp_path):
    _, first = run(tmp_path / "run", replace(CONFIG, epochs=1))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    model, again = run(tmp_path / "run", replace(CONFIG, epochs=1), resume=True)
    assert (again.best, again.final, again.steps) == (first.best, first.final, first.steps)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    best, _ = load_weights(tmp_path / "run" / "best.safetensors")
    assert all(torch.equal(tensor, best[name]) for name, tensor in model.state_dict().items())


@pytest.fixture
def finished(tmp_path):
    run(tmp_path / "run", replace(CONFIG, epochs=1, save_every_seconds=60.0))
    return tmp_path / "run"


def test_other_settings_data_or_model_are_refused(finished):
    config = replace(CONFIG, epochs=1, save_every_seconds=60.0)
    with pytest.raises(UsageError, match="lr 0.01, got 0.02"):
        run(finished, replace(config, lr=0.02), resume=True)
    with pytest.raises(RefusedError, match="4 steps per epoch, expected 6"):
        run(finished, config, resume=True, data=make_data(count=15))
    with pytest.raises(RefusedError, match="images is 23, expected 22"):
        run(finished, config, resume=True, data=make_data(count=23))
    other = make_model()
    other.adapter.bias.requires_grad_(False)
    with pytest.raises(RefusedError, match=r"adapter\.bias"):
        run(finished, config, resume=True, model=other)
    run(finished, replace(config, save_every_seconds=1.0), resume=True)


def test_a_damaged_state_is_refused(finished):
    state = finished / "state.pt"
    state.write_bytes(state.read_bytes()[:-2000])
    with pytest.raises(RefusedError, match="cannot be read"):
        run(finished, resume=True)
    torch.save({"version": 99}, state)
    with pytest.raises(RefusedError, match="version 99"):
        run(finished, resume=True)
    torch.save(Block(), state)
    with pytest.raises(RefusedError, match="cannot be read"):
        run(finished, resume=True)


def test_a_run_is_not_overwritten_unasked(finished, tmp_path):
    with pytest.raises(UsageError, match="holds a run already"):
        run(finished, replace(CONFIG, epochs=1))
    with pytest.raises(UsageError, match="no run to resume"):
        run(tmp_path / "elsewhere", resume=True)
    place = RunFolder(path=finished, force=True)
    config = replace(CONFIG, epochs=1)
    fit(make_model(), make_data(), config, run=place, on_event=None, save_weights=save_weights)
    assert [line["epoch"] for line in metrics(finished) if line["kind"] == "epoch"] == [1]


def test_missing_metrics_are_refused(finished):
    (finished / "metrics.jsonl").write_text("")
    with pytest.raises(RefusedError, match="expected the"):
        run(finished, replace(CONFIG, epochs=1, save_every_seconds=60.0), resume=True)


def test_one_that_was_stopped_in_validation_validates_first(tmp_path, reference):
    data = make_data()
    calls = 0

    def validation():
        nonlocal calls
        calls += 1
        for number, batch in enumerate(data.validation()):
            if calls == 2 and number == 1:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    stopped = FitData(train=data.train, classes=data.classes, validation=validation, record=data.record)
    with pytest.raises(InterruptedRunError, match="6 of 6 steps"):
        run(tmp_path / "run", data=stopped)
    run(tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", reference)
