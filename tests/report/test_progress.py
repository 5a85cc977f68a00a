from __future__ import annotations

import io

import pytest

from cadapt.report.progress import duration, line_of, show_training
from cadapt.train import EpochDone, Notice, RunStarted, Saved, StepDone

STARTED = RunStarted(
    epochs=2, steps_per_epoch=50, epochs_done=0, steps_done=0, device="cpu", precision="fp32", trainable_parameters=1234
)


def step(number: int) -> StepDone:
    return StepDone(
        epoch=1, epochs=2, step=number, steps=50, loss=0.5, top1=0.75, lr=0.1, images_per_second=99.6, eta_seconds=75.0
    )


DONE = EpochDone(
    epoch=1,
    epochs=2,
    loss=0.5,
    top1=0.75,
    lr=0.1,
    images_per_second=99.6,
    seconds=3.0,
    is_best=True,
    validation={"val_loss": 0.25, "val_top1": 0.875},
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_are_sparse():
    stream, now = io.StringIO(), 0.0
    with show_training(stream=stream, clock=lambda: now) as show:
        show(STARTED)
        for number in range(1, 51):
            now += 0.5
            show(step(number))
        show(Saved(path="run", epoch=1, step=0))
        show(DONE)
        show(Notice(message="[bold] is not markup"))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "training 1,234 parameters on cpu in fp32: 2 epochs of 50 steps"
    assert lines[1] == "epoch 1/2 step 1/50  loss 0.5000  top1 75.0%  100 images/s  1m15s left"
    assert [line.split()[3] for line in lines[1:4]] == ["1/50", "21/50", "41/50"]
    assert lines[4] == "epoch 1/2  loss 0.5000  top1 75.0%  100 images/s  val loss 0.2500  val top1 87.5%  best"
    assert lines[5:] == ["note: [bold] is not markup"]


def test_a_terminal_gets_a_live_line_and_the_epochs(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with show_training(stream=stream) as show:
        show(STARTED)
        show(step(1))
        show(DONE)
    assert line_of(DONE) in stream.getvalue()
    assert "\x1b[" in stream.getvalue()


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_quiet_writes_nothing(kind):
    stream = kind()
    with show_training(stream=stream, quiet=True) as show:
        for event in (STARTED, step(1), DONE, Notice(message="x")):
            show(event)
    assert stream.getvalue() == ""


def test_a_resumed_run_says_where_it_goes_on():
    resumed = RunStarted(
        epochs=9,
        steps_per_epoch=5,
        epochs_done=2,
        steps_done=3,
        device="cuda",
        precision="bf16",
        trainable_parameters=1,
    )
    assert line_of(resumed).endswith("going on after epoch 2 and 3 steps")


def test_durations():
    assert [duration(value) for value in (0.0, 59.4, 60.0, 3599.0, 7260.0)] == ["0s", "59s", "1m00s", "59m59s", "2h01m"]
