"""``cadapt insert``: plan a scheme on a base, splice it in, prove it, and write the adapter file."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cadapt.cli._options import AsJson, Checkpoint, Force, Output, Quiet
from cadapt.cli._schemes import LISTED, SCHEME_NAMES
from cadapt.cli._streams import DEFAULT_ADAPTER, check_output, deliver, print_json, print_path
from cadapt.errors import UsageError, close_matches

EXAMPLE = "cadapt insert resnet50 --scheme conv-par --gamma 4"


def command(
    backbone: Annotated[str, typer.Argument(help="A timm model, with a tag for one set of weights.")],
    scheme: Annotated[
        str, typer.Option("--scheme", metavar="NAME", help=f"The method, or several as lora+bias: {LISTED}.")
    ],
    checkpoint: Checkpoint = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained/--no-pretrained", help="Weights from the hub, or random ones from --seed.")
    ] = True,
    img_size: Annotated[
        int | None, typer.Option("--img-size", min=1, help="Height and width in pixels; the model's own if not given.")
    ] = None,
    gamma: Annotated[int | None, typer.Option("--gamma", help="Compression γ: channels over bottleneck [4].")] = None,
    kernel: Annotated[int | None, typer.Option("--kernel", help="Kernel size; the adapted component's.")] = None,
    conv_type: Annotated[str | None, typer.Option("--conv-type", help="depthwise, regular or linear.")] = None,
    alpha: Annotated[str | None, typer.Option("--alpha", help="The scale α: learned or fixed.")] = None,
    init: Annotated[str | None, typer.Option("--init", help="zero (starts as the base) or paper.")] = None,
    include: Annotated[list[str] | None, typer.Option("--include", help="Adapt only sites that match GLOB.")] = None,
    exclude: Annotated[list[str] | None, typer.Option("--exclude", help="Leave out sites that match GLOB.")] = None,
    extra: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A rarer setting of the scheme.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Initialises adapters, and the base if --no-pretrained.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")] = False,
    output: Output = None,
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Put adapters into a backbone and write the adapter file.

    What is written was loaded back, spliced in, and compared with the base on a random batch.
    """
    _check_names(scheme)
    target = output or str(DEFAULT_ADAPTER)
    if not dry_run:
        check_output(target, force=force, as_json=as_json)
    common = {"gamma": gamma, "kernel": kernel, "conv_type": conv_type, "alpha": alpha, "init": init}
    settings: dict[str, Any] = {name: value for name, value in common.items() if value is not None}
    settings |= _read_settings(extra or [])
    from cadapt.jobs import insert_into
    from cadapt.report.insert import show_check, show_plan

    inserted = insert_into(
        backbone,
        scheme,
        settings,
        checkpoint=checkpoint,
        pretrained=pretrained,
        img_size=img_size,
        include=include or (),
        exclude=exclude or (),
        seed=seed,
    )
    if not quiet:
        show_plan(inserted.model)
    record: dict[str, Any] = {"schema": 1, "dry_run": dry_run, "trainable_parameters": inserted.trainable_parameters}
    record["plan"] = inserted.model.plan.to_json()
    if not dry_run:
        data, check = inserted.write()
        deliver(data, target, overwrite=force)
        if not quiet:
            show_check(check, target, len(data))
        record |= {"output": target, "bytes": len(data), "check": check.to_json()}
        print_path(target, as_json=as_json)
    if as_json:
        print_json(record)


def _check_names(scheme: str) -> None:
    """Refuse a mistyped scheme at once: the registry itself takes seconds to import."""
    for name in scheme.split("+"):
        if name not in SCHEME_NAMES and "," not in scheme:
            raise UsageError(f"unknown scheme '{name}'", hint=close_matches(name, SCHEME_NAMES))


def _read_settings(pairs: list[str]) -> dict[str, str]:
    settings = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise UsageError(f"--set {pair!r} is not KEY=VALUE", hint="for example --set alpha_init=0.1")
        settings[name.replace("-", "_")] = value
    return settings
