"""The training record of an adapter file in words. What it holds beyond the known keys is shown as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cadapt.report.console import count, number_of, percent

Record = Mapping[str, Any]


def tell_training(record: Record) -> dict[str, str]:
    """Return the lines of a training record, each under its label.

    The record comes from a file, so that any value may be of any kind: what cannot be told in words is shown raw.
    """
    lines: dict[str, str] = {}
    for label, (keys, tell) in _LINES.items():
        if not record.keys() & keys:
            continue
        try:
            lines[label] = tell(record)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            lines |= {f"training: {key}": str(record[key]) for key in keys if key in record}
    known = {key for keys, _ in _LINES.values() for key in keys}
    return lines | {f"training: {key}": str(value) for key, value in record.items() if key not in known}


def _trained(record: Record) -> str:
    line = f"{number_of(record['epochs'], 'epoch')}, {number_of(record['steps'], 'step')}"
    if "seconds" in record:
        line += f", in {record['seconds']:.0f} s on {record['device']}"
    if "images_per_second" in record:
        line += f", {record['images_per_second']:.0f} pictures/s"
    if record.get("skipped_steps"):
        line += f", {number_of(record['skipped_steps'], 'step')} left out"
    return f"{line}, {record['precision']}"


def _result(record: Record) -> str:
    if "best" not in record:
        return _figures(record["metrics"])
    best = f"best after epoch {count(record['best_epoch'])}: {_figures(record['best'])}"
    last = f"after the last: {_figures(record['final'])}"
    kept = {"best": "the best epoch", "last": "the last epoch"}[record["kept"]]
    return f"{best}; {last}; the file holds {kept}"


_FIGURES = {"val_top1": "validation top-1", "val_loss": "validation loss", "top1": "training top-1", "loss": "loss"}


def _figures(metrics: Mapping[str, float]) -> str:
    names = [name for name in _FIGURES if name in metrics]
    # the training figures say little where there are others
    names = [name for name in names if name.startswith("val_")] or names
    shown = [
        f"{_FIGURES[name]} {percent(metrics[name]) if name.endswith('top1') else f'{metrics[name]:.4g}'}"
        for name in names
    ]
    return ", ".join(shown) or "no figures"


def _data(record: Record) -> str:
    data = record["data"]
    images, classes = data["images"], number_of(data["classes"], "class", "classes")
    line = f"{data['name']} ({data['kind']}): {number_of(images['train'], 'picture')} of {classes} to train on"
    if "val" in images:
        held = f" ({percent(data['val_split'], 0)} held out)" if data.get("val_split") else ""
        line += f", {count(images['val'])} to validate on{held}"
    if data.get("shots"):
        line += f", {number_of(data['shots'], 'shot')} of each class"
    if data.get("skipped"):
        line += f", {count(len(data['skipped']))} unreadable left out"
    return line


def _settings(record: Record) -> str:
    config, options = record["config"], record.get("options") or {}
    batch = f"batch {count(config['batch_size'])}"
    if config["accumulate"] != 1:
        batch += f" × {count(config['accumulate'])}"
    told = [
        batch,
        f"learning rate {config['lr']:g} to {config['min_lr']:g}",
        f"weight decay {config['weight_decay']:g}",
        _warmup(config["warmup_epochs"], config["epochs"]),
    ]
    told += [f"{name.replace('_', ' ')} {config[name]:g}" for name in _RARER if config.get(name)]
    if "augment" in options:
        told.append(f"augmentation {options['augment']}")
    if "head_dropout" in options:
        told.append(f"head dropout {options['head_dropout']:g}" + (" after a norm" if options.get("head_norm") else ""))
    return ", ".join([*told, f"seed {config['seed']}"])


def _warmup(asked: int, epochs: int) -> str:
    # the engine cuts one of more than a quarter of the run to a tenth, and the record keeps what was asked for
    done = asked if 4 * asked <= epochs else epochs // 10
    return f"{number_of(done, 'epoch')} of warm-up" if done else "no warm-up"


_RARER = ("label_smoothing", "mixup", "cutmix", "ema", "clip_grad")


def _versions(record: Record) -> str:
    return ", ".join(f"{name} {version}" for name, version in record["versions"].items())


_TIMES = ("epochs", "steps", "seconds", "device", "precision", "images_per_second", "skipped_steps")
_OUTCOME = ("best_epoch", "best", "final", "metrics", "kept", "loss_curve")
_LINES: Mapping[str, tuple[tuple[str, ...], Callable[[Record], str]]] = {
    "trained": (_TIMES, _trained),
    "reached": (_OUTCOME, _result),
    "data": (("data",), _data),
    "settings": (("config", "options", "seed"), _settings),
    "versions": (("versions",), _versions),
}
