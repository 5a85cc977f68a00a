"""Rows of a listing: the figures are those of the model in depth, failures are rows, and processes change nothing."""

from __future__ import annotations

import pytest
import timm

from cadapt.describe import listing
from cadapt.describe.listing import USUAL_COLUMNS, list_architectures, survey_architecture
from cadapt.describe.model import describe_architecture
from cadapt.errors import CadaptError, UsageError
from cadapt.planning import survey


def test_a_row_says_what_the_model_in_depth_says() -> None:
    names = ("lora", "bias", "conv-par", "consolidator+norm", "full", "convpass")
    row = survey_architecture("test_resnet", schemes=names)
    model = describe_architecture("test_resnet", schemes=names)
    assert (row.error, row.parameters, row.input_size) == (None, model.parameters, model.input_size)
    assert row.site_counts == model.to_json()["site_counts"]
    figures = ("name", "sites", "tensors", "parameters", "share", "reason")
    assert [[getattr(item, name) for name in figures] for item in row.schemes] == [
        [getattr(item, name) for name in figures] for item in model.schemes
    ]


def test_the_usual_columns_are_those_of_the_main_method() -> None:
    assert [item.name for item in survey_architecture("test_resnet").schemes] == list(USUAL_COLUMNS)
    assert USUAL_COLUMNS == ("conv-par", "conv-seq", "res-par", "res-seq")


def test_adapters_of_a_model_have_their_own_kernels_and_parameters() -> None:
    schemes = {item.name: item for item in describe_architecture("test_convnext").schemes}
    for scheme in schemes.values():
        assert sum(item.parameters for item in scheme.adapters) in (scheme.parameters, 0)
    downsamples = {
        name: {item.kernel for item in schemes[name].adapters if item.kind == "downsample"}
        for name in ("res-par", "res-seq")
    }
    # after a 2×2 conv an adapter keeps the grid only with an odd kernel
    assert downsamples == {"res-par": {(2, 2)}, "res-seq": {(1, 1)}}


def test_rows_come_in_the_natural_order_of_names_with_all_they_had() -> None:
    found = list_architectures("test_vit[2-4]", processes=1)
    assert [row.name for row in found.models] == ["test_vit2", "test_vit3", "test_vit4"]
    assert found.models[0].weights == ("r160_in1k",)
    record = found.to_json()
    assert (record["schema"], record["kind"], record["failed"]) == (1, "listing", found.failed)


def test_processes_change_nothing() -> None:
    seen: list[tuple[int, int]] = []
    # what the processes cost is their start; of schemes one that fits, one that is a sum, and one that does not
    names = ("bias", "conv-par+norm", "convpass")
    alone = list_architectures("test_convnext*", schemes=names, processes=1)
    shared = list_architectures(
        "test_convnext*", schemes=names, processes=2, progress=lambda done, total: seen.append((done, total))
    )
    assert shared == alone
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (CadaptError("cannot trace Net: it is\nlong"), "cannot trace Net: it is long"),
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_one_that_cannot_be_surveyed_is_a_row(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(backbone: object) -> object:
        if backbone.base.name == "test_convnext2":  # type: ignore[attr-defined]
            raise error
        return survey(backbone)  # type: ignore[arg-type]

    monkeypatch.setattr(listing, "survey", failing)
    found = list_architectures("test_convnext*", processes=1)
    assert [row.error for row in found.models] == [None, said, None]
    assert found.failed == 1
    assert (found.models[1].schemes, found.models[1].input_size) == ((), (3, 160, 160))


def test_no_match_brings_close_families() -> None:
    with pytest.raises(UsageError, match=r"no model matches 'efficentnet\*'") as refused:
        list_architectures("efficentnet*")
    assert "efficientnet*" in (refused.value.hint or "")
    assert timm.list_models("efficientnet*")
