"""The job behind ``cadapt merge-report``: what it is judged on and fitted on, the comparison, and what it delivers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cadapt
from cadapt.bundle import Bundle, load_bundle
from cadapt.errors import CadaptError, RefusedError, UsageError
from cadapt.jobs import comparing, merging
from cadapt.jobs.comparing import compare_on_data, describe_miss, is_within
from cadapt.jobs.merge_data import PictureBatches, choose_fitted, open_judged
from cadapt.jobs.merge_options import MergeOptions
from cadapt.jobs.merging import merge_bundle
from cadapt.library import base_of, from_bundle
from cadapt.merging import Fit, Fitted, FrontierPoint, OnData, assemble
from cadapt.preprocessing import Preprocessing
from cadapt.tolerance import Tolerance, parse_tolerance
from tests.data.pictures import make_classes
from tests.jobs.lively import SIDE, lively_bundle

FAST: dict[str, Any] = {"device": "cpu", "workers": 0, "latency": False}
TOP1 = parse_tolerance("top1=0.5%")


@pytest.fixture(scope="module")
def linear() -> Bundle:
    return lively_bundle(activation="identity")


@pytest.fixture(scope="module")
def bent() -> Bundle:
    return lively_bundle()


@pytest.fixture(scope="module")
def imgs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classes(tmp_path_factory.mktemp("merging") / "imgs", {"cat": 6, "dog": 5, "owl": 2}, (20, 18))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "fp61"}, "unknown dtype 'fp61'"),
        ({"fit_images": 0}, "--fit-images is 0"),
        ({"finetune_epochs": -1}, "--finetune-epochs is -1"),
        ({"tolerance": TOP1}, "--tolerance needs pictures"),
        ({"fit_data": "x"}, "--fit-data needs pictures"),
        ({"finetune_epochs": 1}, "--finetune-epochs needs pictures"),
        ({"data": "x", "fit": False, "fit_data": "x"}, "--fit-data and --no-fit contradict"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        MergeOptions(**options)


def test_half_of_each_class_is_fitted_on_and_half_judged_on(imgs: Path) -> None:
    judged = open_judged(str(imgs), ("cat", "dog"), skip_bad=False, workers=1, on_progress=None)
    assert len(judged) == 11  # the owls are of no class that the model knows
    chosen = choose_fitted(judged, None, count=100, seed=0)
    fitted, held = set(chosen.fitted.names), set(chosen.judged.names)
    assert not fitted & held and fitted | held == set(judged.names)
    for images in (chosen.fitted, chosen.judged):
        assert sorted(set(images.labels)) == [0, 1]
    assert "one half of --data" in chosen.note and f"{len(held)} pictures" in chosen.note
    assert set(choose_fitted(judged, None, count=100, seed=1).judged.names) != held
    few = choose_fitted(judged, None, count=3, seed=0)
    assert len(few.fitted) == 3 and set(few.fitted.names) < fitted
    assert set(few.judged.names) == held


def test_other_pictures_need_no_classes_and_are_never_judged_on(imgs: Path, tmp_path: Path) -> None:
    judged = open_judged(str(imgs), ("cat", "dog"), skip_bad=False, workers=1, on_progress=None)
    loose = make_classes(tmp_path / "loose", {"any": 4}) / "any"
    chosen = choose_fitted(judged, str(loose), count=3, seed=0)
    assert len(chosen.fitted) == 3 and set(chosen.fitted.labels) == {-1}
    assert chosen.judged.names == judged.names
    # the whole source holds what is judged on: that is left out, here all but the owls
    others = choose_fitted(judged, str(imgs), count=100, seed=0)
    assert {name.partition("/")[0] for name in others.fitted.names} == {"owl"}
    assert "11 that --data has too are left out" in others.note
    (tmp_path / "linked").symlink_to(imgs / "cat", target_is_directory=True)
    for same in (imgs / "cat", tmp_path / "linked"):
        with pytest.raises(UsageError, match="no pictures but those of --data"):
            choose_fitted(judged, str(same), count=3, seed=0)
    make_classes(tmp_path / "parts" / "train", {"a": 2, "b": 1})
    make_classes(tmp_path / "parts" / "val", {"a": 5})
    assert len(choose_fitted(judged, str(tmp_path / "parts"), count=100, seed=0).fitted) == 3
    with pytest.raises(UsageError, match="no folder"):
        choose_fitted(judged, str(tmp_path / "nowhere"), count=3, seed=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RefusedError, match="no images in"):
        choose_fitted(judged, str(tmp_path / "empty"), count=3, seed=0)


def test_a_whole_data_set_is_judged_on_its_validation_part(tmp_path: Path) -> None:
    for part, number in (("train", 5), ("val", 3), ("test", 2)):
        make_classes(tmp_path / "set" / part, {"cat": number, "dgo": 1})
    said: list[str] = []
    settings: dict[str, Any] = {"skip_bad": False, "workers": 1, "on_progress": None, "tell": said.append}
    judged = open_judged(str(tmp_path / "set"), ("cat", "dog"), **settings)
    assert len(judged) == 3
    assert said == ["judged on the part 'val'", "unknown to the model, 1 pictures left out: dgo", "no pictures of: dog"]


def test_too_few_to_split(tmp_path: Path) -> None:
    one = make_classes(tmp_path / "one", {"cat": 1, "dog": 1})
    judged = open_judged(str(one), ("cat", "dog"), skip_bad=False, workers=1, on_progress=None)
    with pytest.raises(UsageError, match="2 pictures cannot be split"):
        choose_fitted(judged, None, count=3, seed=0)


@pytest.mark.parametrize("limit", [0, 2**29], ids=["decoded again", "kept"])
def test_batches_can_be_gone_through_several_times(imgs: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr("cadapt.jobs.merge_data._KEPT_BYTES", limit)
    judged = open_judged(str(imgs), ("cat", "dog"), skip_bad=False, workers=1, on_progress=None)
    preprocessing = Preprocessing(input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3)
    batches = PictureBatches(images=judged, preprocessing=preprocessing, batch_size=4)
    next(iter(batches))  # a pass that is given up keeps nothing
    first, second = ([(images.clone(), labels.clone()) for images, labels in batches] for _ in range(2))
    assert [len(images) for images, _ in first] == [4, 4, 3]
    for (images, labels), (again, same) in zip(first, second, strict=True):
        assert torch.equal(images, again) and torch.equal(labels, same)


def batches_of(count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    for size in (3, count - 3):
        yield torch.randn(size, 3, 4, 4, generator=generator), torch.randint(0, 5, (size,), generator=generator)


def test_the_comparison_is_what_its_definitions_say() -> None:
    torch.manual_seed(0)
    before, after = (nn.Sequential(nn.Flatten(), nn.Linear(48, 5)) for _ in range(2))
    found = compare_on_data(before, after, batches_of(10))
    images, labels = (torch.cat(part) for part in zip(*batches_of(10), strict=True))
    with torch.no_grad():
        one, other = before(images).double(), after(images).double()
    assert found.images == 10
    assert found.top1_before == pytest.approx(float((one.argmax(1) == labels).double().mean()))
    assert found.top1_after == pytest.approx(float((other.argmax(1) == labels).double().mean()))
    assert found.agreement == pytest.approx(float((one.argmax(1) == other.argmax(1)).double().mean()))
    assert found.max_logit_error == pytest.approx(float((one - other).abs().max()), rel=1e-12)
    wanted = F.mse_loss(other, one).sqrt() / one.var(dim=1, correction=0).mean().sqrt()
    assert found.logit_error == pytest.approx(float(wanted), rel=1e-9)


def test_the_comparison_says_so_where_a_model_gives_no_numbers() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    broken = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    nn.init.constant_(broken[1].bias, float("nan"))
    with pytest.raises(CadaptError, match="the merged model gives NaN or infinite outputs in float32"):
        compare_on_data(model, broken, batches_of(10))
    with pytest.raises(CadaptError, match="no images"):
        compare_on_data(model, model, [])


@pytest.mark.parametrize(
    ("tolerance", "met", "said"),
    [
        ("top1=2%", True, ""),
        ("top1=1%", False, "top-1 falls by 2.00%, to 88.00% on 50 pictures"),
        ("disagreement=3%", False, "4.00% of predictions differ"),
        ("disagreement=4%", True, ""),
        ("logit=0.2", False, "a logit differs by 0.25"),
        ("logit=0.25", True, ""),
    ],
)
def test_tolerances(tolerance: str, met: bool, said: str) -> None:
    found = OnData(images=50, top1_before=0.90, top1_after=0.88, agreement=0.96, max_logit_error=0.25, logit_error=0.1)
    assert is_within(parse_tolerance(tolerance), found) is met
    if not met:
        assert said in describe_miss(parse_tolerance(tolerance), found)


def never(*_: object, **__: object) -> Fitted:
    raise AssertionError("nothing is left to fit")


def test_nothing_is_fitted_where_all_folds_exactly(linear: Bundle, imgs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemble, "fold_fitted", never)
    done = merge_bundle(linear, MergeOptions(data=str(imgs), apply="adapter", **FAST), bytes_before=1000)
    report = done.report
    assert (report.merged, report.total) == (2, 2)
    assert done.missed is None and done.data is not None
    assert report.bytes_before == 1000 and report.bytes_after == len(done.data)
    assert report.on_data is not None and report.on_data.images == 11 and report.on_data.agreement == 1.0
    assert not report.end_to_end.random_images
    assert report.tolerance == "" and report.tolerance_met is None
    assert done.facts["fit"] is None
    written = load_bundle(done.data)
    assert written.plan.base == linear.plan.base
    assert not written.plan.insertions and written.plan.deltas
    assert written.training["merged"].startswith("2 of 2 adapters became differences")


def stub(model: Any, rows: Any, fit: Fit, *, as_deltas: bool = False) -> Fitted:
    """Looks at the pictures as a fit does, and folds nothing."""
    images = sum(len(labels) for _, labels in fit.judged)
    fitted = [len(labels) for _, labels in fit.batches]
    assert sum(fitted) and images
    point = FrontierPoint(
        folded=0,
        images=images,
        top1=1.0,
        agreement=1.0,
        max_logit_error=0.0,
        logit_error=0.0,
        parameters=1,
        macs=1,
        chosen=True,
    )
    assert fit.on_progress is not None
    fit.on_progress(f"asked for {fit.tolerance}, {fit.finetune_epochs} epochs, deltas {as_deltas}")
    return Fitted(model=model, rows=rows, frontier=(point,))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "asked for top1=0.5%, 0 epochs, deltas False"),
        ({"tolerance": Tolerance(metric="logit", bound=0.1)}, "asked for logit=0.1, 0 epochs, deltas False"),
        ({"finetune_epochs": 2, "apply": "adapter"}, "asked for top1=0.5%, 2 epochs, deltas True"),
    ],
)
def test_the_fit_is_asked_for_what_the_user_said(
    bent: Bundle, imgs: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], line: str
) -> None:
    monkeypatch.setattr(assemble, "fold_fitted", stub)
    lines: list[str] = []
    done = merge_bundle(bent, MergeOptions(data=str(imgs), fit_images=4, **options, **FAST), tell=lines.append)
    assert line in lines
    assert done.facts["fit"] == {
        "images": 4,
        "judged_images": done.report.frontier[0].images,
        "of_data": True,
        "seed": 0,
        "finetune_epochs": options.get("finetune_epochs", 0),
    }
    assert done.report.tolerance_met is True
    assert any("kernels are fitted on 4 of" in said for said in lines)


def test_no_fit_is_no_fit(bent: Bundle, imgs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemble, "fold_fitted", never)
    done = merge_bundle(bent, MergeOptions(data=str(imgs), fit=False, **FAST))
    assert done.report.gone == 0 and done.report.frontier == ()
    assert done.data is None and done.report.bytes_after is not None


def test_a_tolerance_that_is_missed_delivers_nothing(
    linear: Bundle, imgs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = OnData(images=11, top1_before=1.0, top1_after=0.5, agreement=0.5, max_logit_error=3.0, logit_error=1.0)
    monkeypatch.setattr(merging, "compare_on_data", lambda *_, **__: far)
    options = MergeOptions(data=str(imgs), tolerance=TOP1, apply="adapter", **FAST)
    done = merge_bundle(linear, options)
    assert done.data is None
    assert done.missed == ("the merged model is not within top1=0.5%: top-1 falls by 50.00%, to 50.00% on 11 pictures")
    assert done.report.tolerance_met is False and done.report.on_data == far
    # without the user's own bound it is a figure like the others
    assert merge_bundle(linear, replace(options, tolerance=None)).data is not None


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_what_is_judged_is_what_is_delivered(
    linear: Bundle, imgs: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    judged = []
    compare = comparing.compare_on_data

    def keep(before: nn.Module, after: nn.Module, *arguments: Any, **settings: Any) -> OnData:
        judged.append((after, settings["dtype"]))
        return compare(before, after, *arguments, **settings)

    monkeypatch.setattr(merging, "compare_on_data", keep)
    done = merge_bundle(linear, MergeOptions(data=str(imgs), dtype=dtype, apply="adapter", **FAST))
    assert done.data is not None
    written = load_bundle(done.data)
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert {tensor.dtype for tensor in written.tensors.values()} == {wanted}
    (after, at), given = judged[0], from_bundle(written, base_of(written))
    assert at == wanted
    for name, tensor in given.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor), name
    assert done.report.dtype == str(wanted).removeprefix("torch.")
    ends = done.report.end_to_end
    assert 1e-5 * ends.logit_scale < ends.max_abs_error < 0.1 * ends.logit_scale
    assert ends.logit_effect > 0.1 * ends.logit_scale


def test_latency_is_of_the_four_forms_and_goes_into_the_frontier(
    bent: Bundle, imgs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cadapt.merging import Latency, ModelLatency

    def measured(models: dict[str, nn.Module], **_: Any) -> Latency:
        rows = [
            ModelLatency(name=name, milliseconds=1, ratio=place, ratio_low=1, ratio_high=1, nodes=1, bytes=1)  # type: ignore[arg-type]
            for place, name in enumerate(models, start=1)
        ]
        return Latency(models=tuple(rows), batch_size=1, turns=1, threads=1, runtime="made up")

    monkeypatch.setattr(assemble, "fold_fitted", stub)
    monkeypatch.setattr(merging, "compare_models", measured)
    options = MergeOptions(data=str(imgs), **{**FAST, "latency": None})
    report = merge_bundle(bent, options).report
    assert report.latency is not None
    names = [item.name for item in report.latency.models]
    assert {"base", "adapted", "merged"} <= set(names)
    assert report.frontier[0].latency == names.index("merged") + 1

    def refuse(*_: Any, **__: Any) -> Latency:
        raise CadaptError("cannot measure latency: onnx not installed")

    monkeypatch.setattr(merging, "compare_models", refuse)
    lines: list[str] = []
    assert merge_bundle(bent, replace(options, fit=False), tell=lines.append).report.latency is None
    assert "latency is not measured: cannot measure latency: onnx not installed" in lines
    with pytest.raises(CadaptError, match="not installed"):
        merge_bundle(bent, MergeOptions(latency=True))


def test_the_library_takes_a_fit_as_it_stands(bent: Bundle) -> None:
    """Batches are any list of pictures and labels; the names are at the package's front."""
    model = from_bundle(bent, base_of(bent))
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(6, 3, SIDE, SIDE, generator=generator), torch.zeros(6, dtype=torch.long))] * 2
    fit = cadapt.Fit(batches=batches, judged=batches, tolerance=cadapt.parse_tolerance("disagreement=100%"))
    merged, report = cadapt.merge(model, fit=fit, as_deltas=True)
    assert report.frontier and report.tolerance_met
    assert report.gone == report.total
    small = cadapt.to_deltas(model, merged)
    with torch.no_grad():
        wanted, got = merged(batches[0][0]), small(batches[0][0])
    assert float((wanted - got).abs().max()) <= 1e-5 * float(wanted.abs().max())
