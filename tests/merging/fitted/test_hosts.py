"""Hosts: what is added to a host's weight arrives at the joint as the walk says, and nowhere else."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from cadapt.adapted import AdaptedModel
from cadapt.errors import CadaptError
from cadapt.graph.trace import record_shapes
from cadapt.merging.fitted.hosts import Joint, find_joints
from cadapt.merging.fitted.watch import values_of
from cadapt.planning import survey
from tests.merging.cases import toy, trained
from tests.models import BASES, make_images

SCHEMES = ("conv-par", "conv-seq", "res-par", "res-seq")


def prepared(base: str, scheme: str) -> AdaptedModel:
    model = trained(base, scheme).double().eval()
    record_shapes(model.graph, model, model.preprocessing.input_size)
    return model


def at_the_joint(joint: Joint, change: torch.Tensor, host: int) -> torch.Tensor:
    """What a change of a host's output comes to at the joint, by the walk's word."""
    found = joint.hosts[host]
    shape = [1] * change.ndim
    shape[1 if isinstance(found.node.meta["host"], nn.Conv2d) else -1] = -1
    change = change * found.scale.reshape(shape)
    for axes in reversed(found.axes):
        if not axes:
            change = change.unflatten(1, (int(change.shape[1] ** 0.5), -1))
            continue
        change = change.permute(tuple(sorted(range(len(axes)), key=lambda index: axes[index])))
    return change


@pytest.mark.parametrize("base", sorted(BASES))
def test_a_change_of_a_host_arrives_at_the_joint(base: str) -> None:
    images = make_images(base, batch=2, seed=3).double()
    for scheme in SCHEMES:
        try:
            model = prepared(base, scheme)
        except CadaptError:
            continue  # the scheme has no place there
        for joint in find_joints(model):
            for index, host in enumerate(joint.hosts):
                source = host.node.all_input_nodes[0]
                wanted = {source, joint.before or joint.output}
                before = values_of(model, wanted, images)
                changed = copy.deepcopy(host.node.meta["host"])
                with torch.no_grad():
                    changed.weight.mul_(1 + 0.3 * torch.rand_like(changed.weight))
                    moved = changed(before[source]) - host.node.meta["host"](before[source])
                own = model.get_submodule(host.path)
                model.set_submodule(host.path, changed)
                after = values_of(model, wanted, images)
                model.set_submodule(host.path, own)
                assert torch.equal(after[source], before[source])
                node = joint.before or joint.output
                arrived = after[node] - before[node]
                expected = at_the_joint(joint, moved, index)
                assert float((arrived - expected).abs().max()) <= 1e-10 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize(
    ("base", "scheme", "first", "relu"),
    [
        ("plain", "conv-par", ("layer1.0.conv1",), False),
        ("plain", "res-par", ("layer1.0.conv2",), True),
        ("layer-scaled", "res-par", ("stages.0.blocks.0.mlp.fc2",), False),
        ("tokens", "res-seq", ("blocks.0.mlp.fc2",), False),
        ("windowed", "res-par", ("layers.0.blocks.0.mlp.fc2",), False),
        ("norm-free", "conv-par", ("stages.0.0.conv2",), False),
        ("reused", "conv-par", (), False),
    ],
)
def test_the_host_of_the_first_site(base: str, scheme: str, first: tuple[str, ...], relu: bool) -> None:
    joint = find_joints(prepared(base, scheme))[0]
    assert tuple(host.path for host in joint.hosts) == first
    assert (joint.before is not None) == relu


def test_a_shortcut_with_a_conv_is_a_host_as_well() -> None:
    joints = find_joints(prepared("plain", "res-par"))
    assert [host.path for host in joints[1].hosts] == ["layer2.0.conv2", "layer2.0.downsample.1"]


def test_layers_that_compute_their_weight_are_hosts_only_where_they_may_be_plain() -> None:
    model = prepared("weight-standardised", "conv-par")
    assert all(joint.hosts for joint in find_joints(model))
    assert not any(joint.hosts for joint in find_joints(model, computed=False))


def test_a_value_that_is_read_elsewhere_has_no_host() -> None:
    model: Any = trained(toy(nn.Conv2d(8, 8, 3, padding=1)), "conv-par").double().eval()
    record_shapes(model.graph, model, model.preprocessing.input_size)
    joint = find_joints(model)[0]
    assert joint.hosts
    with model.graph.inserting_after(joint.total):
        model.graph.call_function(torch.neg, (joint.output,))
    assert not find_joints(model)[0].hosts


def test_a_norm_without_weights_and_one_that_is_zero_are_walked_through() -> None:
    backbone, _ = toy(nn.Conv2d(8, 8, 3, padding=1), norm=True)
    for norm in (nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8)):
        backbone.model.blocks[0].norm = norm
        if norm.weight is not None:
            nn.init.zeros_(norm.weight)
        model = trained((backbone, survey(backbone)), "res-par").double().eval()
        record_shapes(model.graph, model, model.preprocessing.input_size)
        found = {host.path: host.scale for joint in find_joints(model) for host in joint.hosts}
        assert "blocks.0.project" in found
        assert all(bool(scale.isfinite().all()) for scale in found.values())
