"""The CNN backbones, their weights, and the ViT behind the same interface."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from models.backbones import create_backbone
from tests.methods.recorded import MADE
from tests.mxnet import write_params
from tests.recorded import GOLDEN, recorded
from utils.image import normalize

# Where the recorded names of maps are in our lists.
TAPS = {
    "vgg16": {"conv3": 0, "conv6": 3},
    "resnet50": {"conv3": 1, "conv6": 4},
    "resnet101": {"conv3": 1, "conv6": 4},
    "resnet38": {"conv3": 0, "conv4": 1, "conv5": 2, "conv6": 3},
}
OURS = {"resnet38": "resnet38d", "vgg16": "vgg16d"}
SMALL = dict(name="resnet38d", width=4)


@recorded("wsfcn_backbones", "onestage_backbones")
def test_maps_match_reference_values(case):
    image = case.input("x")
    for name in dict.fromkeys(key.split("_")[0] for key in case):
        options = {"conv4_stride": 2} if (case.name, name) == ("wsfcn_backbones", "vgg16") else {}
        with torch.device("meta"):
            backbone = create_backbone(OURS.get(name, name), **options).eval()
        case.load_author_weights(backbone, {key: key for key in backbone.state_dict()}, MADE)
        inner = []
        if name == "resnet38":  # a block that is no map of ours
            backbone.b2_2.register_forward_hook(lambda block, x, output, inner=inner: inner.append(output[0]))
        with torch.no_grad():
            maps = backbone(image)
        taps = {tap: maps[i] for tap, i in TAPS[name].items()} | dict(zip(["conv2"], inner))
        for entry in case.starting(f"{name}_"):
            case.compare(entry, taps[entry.removeprefix(f"{name}_")], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("system, variant", [("wsfcn", "resnet38d"), ("onestage", "resnet38d"),
                                             ("onestage", "resnet50"), ("wsfcn", "resnet101"),
                                             ("onestage", "vgg16d")])  # fmt: skip
def test_parameters_have_the_published_names_and_shapes(system, variant):
    with torch.device("meta"):
        own = {key: list(value.shape) for key, value in create_backbone(variant).state_dict().items()}
    if variant == "resnet38d":
        entries = json.loads((GOLDEN / f"state_dict_{system}.json").read_text())["entries"]
    else:
        listed = json.loads((GOLDEN / f"state_dict_{system}_variants.json").read_text())
        entries = listed[f"{variant.removesuffix('d')}_ae"]
    published = {key: shape for key, shape, *_ in entries}
    assert {key: published[key] for key in own} == own


def trained(backbone):
    return {name.split(".")[0] for name, p in backbone.named_parameters() if p.requires_grad}


def test_published_layers_are_frozen():
    with torch.device("meta"):
        assert {"conv1a", "b2", "b2_1", "b2_2", "bn7"}.isdisjoint(trained(create_backbone("resnet38d")))
        assert trained(create_backbone("resnet50")) == {"layer1", "layer2", "layer3", "layer4"}
        assert {"conv1_1", "conv1_2"}.isdisjoint(trained(create_backbone("vgg16d")))
        irn = create_backbone("resnet50", frozen=["conv1", "bn1", "layer1", "layer2"], train_affine=True)
        assert trained(irn) == {"layer3", "layer4"}
        assert irn.layer3[0].bn1.weight.requires_grad and not irn.layer2[0].bn1.weight.requires_grad
        assert not any(p.requires_grad for p in create_backbone("resnet50", frozen="all").parameters())


@pytest.mark.parametrize("options", [{}, {"frozen": [], "train_affine": True}])
def test_batch_statistics_never_move(options):
    backbone = create_backbone(**SMALL, **options)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    model = nn.Sequential(backbone)
    assert model.train() is model and backbone.train() is backbone
    assert backbone.training and not backbone.b4.bn_branch2a.training
    sum(m.square().mean() for m in backbone(torch.randn(2, 3, 24, 24))).backward()
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, before[key]), key
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all((norm.weight.grad is not None) == bool(options) for norm in norms)
    assert (backbone.conv1a.weight.grad is not None) == bool(options)


# -- weights


@pytest.fixture
def offline_timm(monkeypatch):
    """timm's models without a download: random weights under timm's own names, by tag."""
    create_model, states = timm.create_model, {}

    def untrained(tag, pretrained, num_classes):
        assert pretrained
        with torch.device("meta"):
            model = create_model(tag, pretrained=False, num_classes=num_classes)
        # The 4096-wide layers of VGG-16, which are left out, at a size that costs nothing.
        state = {
            k: torch.rand(v.shape if "pre_logits" not in k else 1) for k, v in model.state_dict().items()
        }
        states[tag] = state
        model.state_dict = lambda: state
        return model

    monkeypatch.setattr("timm.create_model", untrained)
    return states


def test_torchvision_weights_of_resnet_load(offline_timm):
    backbone = create_backbone("resnet50", pretrained="timm")
    theirs = offline_timm["resnet50.tv_in1k"]
    assert all(torch.equal(value, theirs[name]) for name, value in backbone.named_parameters())
    assert torch.equal(backbone.bn1.running_mean, theirs["bn1.running_mean"])


def test_torchvision_weights_of_vgg_load_under_our_names(offline_timm, caplog):
    backbone = create_backbone("vgg16d", pretrained="timm")
    theirs = offline_timm["vgg16.tv_in1k"]
    convs = [value for key, value in backbone.state_dict().items() if key.startswith("conv")]
    features = [value for key, value in theirs.items() if key.startswith("features")]
    assert len(convs) == len(features) == 26
    assert all(torch.equal(a, b) for a, b in zip(convs, features))
    assert "fc7.weight" in caplog.text


def test_resnet38d_loads_from_a_file_without_counters(tmp_path):
    source = create_backbone(**SMALL)
    weights = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(weights | {"linear1000.weight": torch.zeros(3)}, tmp_path / "w.safetensors")
    loaded = create_backbone(**SMALL, pretrained=tmp_path / "w.safetensors")
    for key, value in weights.items():
        assert torch.equal(loaded.state_dict()[key], value)
    del weights["b4_3.conv_branch2a.weight"]
    torch.save(weights, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match="is missing"):
        create_backbone(**SMALL, pretrained=tmp_path / "cut.pth")
    torch.save(weights | {"b9.weight": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(ValueError, match="no place"):
        create_backbone(**SMALL, pretrained=tmp_path / "more.pth")


def test_weights_of_mxnet_match_recorded_names(tmp_path):
    """MXNet's name -> the published one, recorded from the authors' converter; and the names it drops."""
    recorded = json.loads((GOLDEN / "resnet38d_mxnet_names.json").read_text())
    source = create_backbone("resnet38d", width=2).state_dict()
    arrays = {name: source[ours].numpy() for name, ours in recorded["map"].items()}
    arrays |= {name: torch.zeros(3, 2).numpy() for name in recorded["dropped"]}
    path = tmp_path / "net.params"
    write_params(path, arrays)
    loaded = create_backbone("resnet38d", width=2, pretrained=path).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in source.items())
    del arrays["arg:res4b3_branch2a_weight"]
    write_params(path, arrays)
    with pytest.raises(ValueError, match=r"b4_3\.conv_branch2a\.weight is missing"):
        create_backbone("resnet38d", width=2, pretrained=path)


class Flat(nn.Conv2d):
    """A backbone of somebody else, with a normalisation of its own."""

    mean, std, dims, strides = (127.5, 127.5, 127.5), (127.5, 127.5, 127.5), (4,), (4,)

    def __init__(self):
        super().__init__(3, 4, 4, 4)


def test_a_backbone_of_another_project_is_an_import_path_with_its_own_normalisation():
    backbone = create_backbone(f"{__name__}.Flat")
    image_rgb = torch.randint(0, 256, (1, 3, 8, 8))
    expected = nn.Conv2d.forward(backbone, image_rgb / 127.5 - 1)
    assert_close(backbone(normalize(image_rgb)), expected, rtol=1e-4, atol=1e-5)


# -- a ViT as a pyramid


PYRAMIDS = [
    dict(name="vit_demo", width=32, depth=4, heads=2, image_size=32),
    dict(name="vit_demo", width=32, depth=4, heads=2, image_size=32, stem="patch", patch_size=16),
    dict(name="vit_demo", width=32, depth=3, heads=2, image_size=32, stem="patch"),
]


@pytest.mark.parametrize("options", PYRAMIDS)
@pytest.mark.parametrize("size", [(32, 48), (37, 50), (5, 9)])
def test_pyramid_has_the_interface_of_a_cnn(options, size):
    backbone = create_backbone(**options, pyramid=True)
    maps = backbone(torch.randn(2, 3, *size))
    assert tuple(m.shape[1] for m in maps) == backbone.dims
    patch = options.get("patch_size", 8)
    for i, m in enumerate(maps):
        stride = 4 if i == backbone.shallow else patch
        assert m.shape[-2:] == tuple(-(-n // stride) for n in size)
    sum(m.mean() for m in maps).backward()
    assert all((p.grad is not None) == p.requires_grad for p in backbone.parameters())
