"""Sites: the output's grid in every layout, and records that older files lack or that were forged."""

import pytest

from cadapt.errors import RefusedError
from cadapt.site import Site

TOKENS = Site(
    path="stages.1.0",
    kind="block",
    in_shape=(1 + 14 * 10, 8),
    out_shape=(1 + 7 * 5, 16),
    layout="NLC",
    grid=(14, 10),
    out_grid=(7, 5),
    stride=(2, 2),
    prefix_tokens=1,
)


@pytest.mark.parametrize(
    ("layout", "out_shape", "out_grid", "expected"),
    [
        ("NCHW", (16, 7, 5), None, (7, 5)),
        ("NHWC", (7, 5, 16), None, (7, 5)),
        ("NLC", (36, 16), (7, 5), (7, 5)),
        ("NLC", (36, 16), None, None),
        ("NC", (16,), None, None),
    ],
)
def test_the_output_grid_of_every_layout(layout, out_shape, out_grid, expected):
    site = Site(
        path="a", kind="block", in_shape=out_shape, out_shape=out_shape, layout=layout, grid=None, out_grid=out_grid
    )
    assert site.output_grid == expected


def test_a_site_of_tokens_survives_json():
    record = TOKENS.to_json()
    assert record["out_grid"] == (7, 5)
    assert Site.from_json({**record, "out_grid": [7, 5]}) == TOKENS


def test_a_record_from_before_the_output_grid_is_read_to_an_equal_site():
    site = Site(path="conv", kind="conv", in_shape=(8, 4, 4), out_shape=(8, 4, 4), grid=(4, 4), kernel=(3, 3))
    record = {key: value for key, value in site.to_json().items() if key != "out_grid"}
    assert Site.from_json(record) == site


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"out_grid": [7]}, "out_grid of a Site"),
        ({"out_grid": "7x5"}, "out_grid of a Site"),
        ({"out_grid": [-7, -5]}, "out_grid of site 'stages.1.0' is .*below 1"),
        ({"stride": [0, 1]}, "stride of site 'stages.1.0' is .*below 1"),
        ({"prefix_tokens": -1}, "prefix_tokens of site 'stages.1.0' is -1, below 0"),
    ],
)
def test_a_forged_geometry_is_refused_by_its_field(change, said):
    with pytest.raises(RefusedError, match=said):
        Site.from_json({**TOKENS.to_json(), **change})
