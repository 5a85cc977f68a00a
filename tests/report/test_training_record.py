"""The training record in words, and what cannot be told in them, since a file may hold anything."""

from __future__ import annotations

from typing import Any

from cadapt.report.training_record import tell_training

RECORD: dict[str, Any] = {
    "epochs": 1,
    "steps": 200,
    "seconds": 12.3,
    "device": "cpu",
    "precision": "fp32",
    "images_per_second": 111.1,
    "skipped_steps": 0,
    "best_epoch": 1,
    "best": {"loss": 0.1, "top1": 0.9, "val_loss": 0.25, "val_top1": 0.875},
    "final": {"loss": 0.1, "top1": 0.9},
    "kept": "best",
    "loss_curve": [0.1],
    "data": {
        "name": "pets", "kind": "folder", "classes": 37, "images": {"train": 3000, "val": 300}, "val_split": 0.1,
        "skipped": ["a.png"], "sha256": {"train": "00"},
    },
    "config": {
        "batch_size": 64, "accumulate": 1, "lr": 0.001, "min_lr": 1e-6, "weight_decay": 0.0001, "warmup_epochs": 10,
        "epochs": 1, "mixup": 0.2, "ema": None, "seed": 0,
    },
    "options": {"augment": "light", "head_dropout": 0.2, "head_norm": False},
    "versions": {"cadapt": "0.1.0", "torch": "2.11"},
}  # fmt: skip


def test_it_is_told_in_words() -> None:
    assert tell_training(RECORD) == {
        "trained": "1 epoch, 200 steps, in 12 s on cpu, 111 pictures/s, fp32",
        "reached": "best after epoch 1: validation top-1 87.50 %, validation loss 0.25; "
        "after the last: training top-1 90.00 %, loss 0.1; the file holds the best epoch",
        "data": "pets (folder): 3,000 pictures of 37 classes to train on, 300 to validate on (10 % held out), "
        "1 unreadable left out",
        "settings": "batch 64, learning rate 0.001 to 1e-06, weight decay 0.0001, no warm-up, mixup 0.2, "
        "augmentation light, head dropout 0.2, seed 0",
        "versions": "cadapt 0.1.0, torch 2.11",
    }


def test_a_save_within_a_run_has_its_metrics() -> None:
    partial = {"epochs": 2, "steps": 4, "precision": "bf16", "metrics": {"loss": 0.5}, "seed": 0}
    told = tell_training(partial)
    assert told["trained"] == "2 epochs, 4 steps, bf16"
    assert told["reached"] == "loss 0.5"


def test_what_cannot_be_told_is_shown_as_it_is() -> None:
    odd = {"epochs": "many", "steps": 1, "best": 5, "data": [], "versions": None, "note": {"by": "me"}}
    assert tell_training(odd) == {
        "training: epochs": "many",
        "training: steps": "1",
        "training: best": "5",
        "training: data": "[]",
        "training: versions": "None",
        "training: note": "{'by': 'me'}",
    }
    assert tell_training({}) == {}
