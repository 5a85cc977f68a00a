from __future__ import annotations

import hashlib
import io
import json
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch

from cadapt.errors import CadaptError, InterruptedRunError, RefusedError, UsageError
from cadapt.train import FitData, Notice, RunFolder, RunStarted, Saved, fit
from cadapt.train.checkpoint import read_state, write_state

from .runs import CONFIG, Block, Loader, load_weights, make_data, make_model, run, run_in_process, save_weights

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


@pytest.mark.parametrize("error", [CadaptError("a loading worker died"), OSError(24, "Too many open files")])
@pytest.mark.parametrize("place", ["training", "validation"])
def test_what_stops_the_batches_loses_no_step(tmp_path, reference, error, place):
    class Failing(Loader):
        def batches(self, epoch, start_step=0):
            for step, batch in enumerate(super().batches(epoch, start_step)):
                if epoch == 1 and step == 3:
                    raise error
                yield batch

    def failing():
        yield from list(make_data().validation())[:1]
        raise error

    data = make_data()
    changed = {"train": Failing(data.train.images)} if place == "training" else {"validation": failing}
    seldom = replace(CONFIG, save_every_seconds=1e6)
    with pytest.raises(type(error)) as caught:
        run(tmp_path / "run", seldom, data=replace(data, **changed))
    assert caught.value is error
    ledger = read_state(tmp_path / "run" / "state.pt")["ledger"]
    assert (ledger["epoch"], ledger["step"]) == ((1, 3) if place == "training" else (0, 6))
    run(tmp_path / "run", CONFIG, resume=True)
    assert_same_run(tmp_path / "run", reference)


@pytest.mark.parametrize("workers", [0, 2, 4])
def test_killed_between_two_writes_in_mid_epoch_and_resumed_in_fresh_processes(tmp_path, reference, workers):
    folder = tmp_path / "run"
    assert run_in_process(folder, workers, signals={9: "SIGKILL"}) == -signal.SIGKILL
    state = read_state(folder / "state.pt")
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


def forged(value):
    """Bytes with a digest that holds: what a state of another making looks like."""
    if not isinstance(value, bytes):
        buffer = io.BytesIO()
        torch.save(value, buffer)
        value = buffer.getvalue()
    return value + hashlib.sha256(value).digest()


@pytest.mark.parametrize("flip", range(200))
def test_one_flipped_bit_is_refused(tmp_path, flip):
    path = tmp_path / "state.pt"
    write_state(path, {"tensors": {"a": torch.arange(100.0)}, "config": {"lr": 0.1}})
    assert torch.equal(read_state(path)["tensors"]["a"], torch.arange(100.0))
    data = bytearray(path.read_bytes())
    data[flip * len(data) // 200] ^= 1 << flip % 8
    path.write_bytes(data)
    with pytest.raises(RefusedError, match="does not match its SHA-256"):
        read_state(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "SHA-256"),
        (b"short", "SHA-256"),
        (forged(b""), "holds no state"),
        (forged(b"\x80\x02R."), "holds no state"),
        (forged(Block()), "holds no state"),
        (forged([1, 2]), "version None"),
        (forged({"version": 99}), "version 99"),
    ],
    ids=["empty", "short", "nothing", "malformed", "code", "list", "version"],
)
def test_what_is_no_state_is_refused_in_one_line(finished, content, expected):
    (finished / "state.pt").write_bytes(content)
    with pytest.raises(RefusedError, match=expected) as caught:
        run(finished, replace(CONFIG, epochs=1, save_every_seconds=60.0), resume=True)
    assert "\n" not in caught.value.message


def test_a_truncated_state_is_refused(finished):
    state = finished / "state.pt"
    state.write_bytes(state.read_bytes()[:-2000])
    with pytest.raises(RefusedError, match="damaged"):
        run(finished, resume=True)


def rewrite(folder, **changes):
    write_state(folder / "state.pt", read_state(folder / "state.pt") | changes)


def test_a_resumed_run_keeps_the_precision_that_auto_was(finished):
    config = replace(CONFIG, epochs=1, save_every_seconds=60.0)
    assert read_state(finished / "state.pt")["precision"] == "fp32"
    rewrite(finished, precision="bf16")
    events = []
    _, result = run(finished, config, resume=True, on_event=events.append)
    assert result.precision == "bf16"
    assert [event.precision for event in events if isinstance(event, RunStarted)] == ["bf16"]
    rewrite(finished, precision="fp16", computed_by={"device": "cuda (NVIDIA A100)"})
    with pytest.raises(UsageError, match="cannot resume: precision fp16 needs a cuda device") as caught:
        run(finished, config, resume=True)
    assert "A100" in caught.value.hint


def test_what_rounds_differently_is_noticed(finished):
    resume = partial(run, finished, replace(CONFIG, epochs=1, save_every_seconds=60.0), resume=True)
    events = []
    resume(on_event=events.append)
    assert not [event for event in events if isinstance(event, Notice)]
    before = {**read_state(finished / "state.pt")["computed_by"], "device": "cuda (NVIDIA A100)", "compile": True}
    rewrite(finished, computed_by=before)
    resume(on_event=events.append)
    notices = [event.message for event in events if isinstance(event, Notice)]
    assert len(notices) == 2
    assert notices[0].startswith("device is cpu, was cuda (NVIDIA A100) before")
    assert notices[1].startswith("compile is False, was True before")


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


def test_a_termination_of_all_processes_is_no_failure_of_the_readers(tmp_path, reference):
    """Sent to the whole group, SIGTERM ends the readers before the run has heard of it."""
    data = make_data()

    class Stopped:
        steps_per_epoch = data.train.steps_per_epoch

        def batches(self, epoch, start_step=0):
            for number, batch in enumerate(data.train.batches(epoch, start_step)):
                if epoch == 1 and number == 2:
                    signal.raise_signal(signal.SIGTERM)
                    raise CadaptError("a loading worker died")
                yield batch

    with pytest.raises(InterruptedRunError, match="stopped by SIGTERM") as caught:
        run(tmp_path / "run", data=replace(data, train=Stopped()))
    assert caught.value.exit_code == 143
    run(tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", reference)
