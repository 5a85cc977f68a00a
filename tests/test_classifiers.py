"""Where a model's logits come from, and that a task's head stands there, in all forms that timm's classifiers have."""

import pytest
import timm
import torch

import cadapt
from cadapt.backbone import describe_model
from cadapt.classifiers import backbone_tensors, classifier_paths
from cadapt.plan import Plan

PATHS = {
    "test_resnet": ("fc",),
    "test_convnext": ("head.fc",),
    "test_vit": ("head",),
    "vgg11": ("head.fc",),
    "dpn68": ("classifier",),
    # an MLP of its own, of which the last layer gives the logits
    "caformer_s18": ("head.fc.fc2",),
    # one behind a norm; two of them, averaged
    "cpubone_nano": ("head.classifier.linear",),
    "repvit_m0_9": ("head.head.l", "head.head_dist.l"),
    "swiftformer_xs": ("head", "head_dist"),
    "pit_ti_distilled_224": ("head", "head_dist"),
}


def on_meta(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return timm.create_model(name).eval()


@pytest.mark.parametrize("name", PATHS)
def test_classifiers_are_found(name: str) -> None:
    model = on_meta(name)
    paths = classifier_paths(model)
    assert paths == PATHS[name]
    assert not any(item.startswith(tuple(f"{path}." for path in paths)) for item in backbone_tensors(model))
    assert describe_model(model).base.sha256 == ""


@pytest.mark.parametrize(
    "name", ["caformer_s18", "cpubone_nano", "iformer_t", "efficientvim_m1", "samvit_base_patch16"]
)
def test_a_fresh_head_gives_the_classes_asked_for(name: str) -> None:
    with torch.device("meta"):
        model = cadapt.insert(on_meta(name), "linear", num_classes=5, head_norm=True)
        size = model.preprocessing.input_size
        assert model(torch.empty(2, *size)).shape == (2, 5)


@pytest.mark.parametrize("name", ["swiftformer_xs", "pit_ti_distilled_224"])
def test_each_of_several_classifiers_has_one_of_its_own(name: str) -> None:
    torch.manual_seed(0)
    base = timm.create_model(name).eval()
    model = cadapt.insert(base, "linear", num_classes=3).eval()
    trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [f"adapters.head.{index}.classifier.{part}" for index in (0, 1) for part in ("weight", "bias")]
    images = torch.randn(2, *model.preprocessing.input_size)
    heads = [model.get_submodule(f"adapters.head.{index}") for index in (0, 1)]
    seen: list[torch.Tensor] = []
    for head in heads:
        head.register_forward_hook(lambda _, given, output: seen.append(output))
    logits = model(images)
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(logits, (seen[0] + seen[1]) / 2)
    assert Plan.from_json(model.plan.to_json()) == model.plan


def test_a_copy_of_several_classifiers_computes_what_the_base_does() -> None:
    torch.manual_seed(0)
    base = timm.create_model("swiftformer_xs").eval()
    model = cadapt.insert(base, "res-seq").eval()
    images = torch.randn(2, *model.preprocessing.input_size)
    assert torch.equal(model(images), base(images))
    merged, _ = cadapt.merge(cadapt.insert(base, "linear"), images=images)
    state = cadapt.merging.timm_state_dict(merged) if hasattr(cadapt, "merging") else merged.state_dict()
    assert {"head.weight", "head_dist.weight"} <= state.keys()
