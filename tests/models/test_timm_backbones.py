"""Models of timm as backbones: timm's outputs, any size, weight files in circulation, options."""

import copy

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from methods.mcc import masked_class_token
from methods.toco import ToCo
from models.backbones import (
    GivesMaps,
    GivesTokens,
    create_backbone,
    layer_scales,
    pretrained_weights,
    whole_crop,
)
from utils.image import denormalize, normalize

# Small ones of each family: class token, registers, rotary positions, patch 14, mean and std of its own, no
# class token; thinner and shorter than timm's own.
SMALL = {"embed_dim": 24, "depth": 4, "num_heads": 2}
VITS = {
    "test_vit3": {},
    "vit_small_patch14_reg4_dinov2": SMALL,
    "vit_small_patch16_dinov3": SMALL,
    "eva02_tiny_patch14_224": SMALL,
    "vit_base_patch32_clip_224": SMALL,
    "vit_base_patch16_siglip_224": SMALL,
    "deit3_small_patch16_224": SMALL,
}
MAPS = ["test_resnet", "test_convnext", "pvt_v2_b0"]
TOCO = {"num_local_crops": 2, "head": {"hidden_dim": 8, "bottleneck_dim": 4, "out_dim": 8}}


def vit(name, **options):
    torch.manual_seed(0)
    return create_backbone(name, options=VITS[name], **options).eval()


@pytest.mark.parametrize("name", list(VITS)[1:6])
def test_tokens_are_those_of_timm_at_any_size(name):
    backbone = vit(name)
    patch = backbone.patch_size
    image = torch.randn(2, 3, 3 * patch, 5 * patch)
    theirs = timm.create_model(name, num_classes=0, dynamic_img_size=True, **VITS[name]).eval()
    theirs.load_state_dict(backbone.net.state_dict(), strict=False)
    mean, std = (torch.tensor(theirs.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    shown = (denormalize(image) / 255 - mean) / std
    with torch.no_grad():
        tokens, expected = backbone(image), theirs.forward_features(shown)
        prefix = expected.shape[1] - 15
        assert_close(tokens.patch_tokens.flatten(2).mT, expected[:, prefix:], rtol=1e-5, atol=1e-5)
        cls_token = expected[:, 0] if prefix else expected.mean(1)
        assert_close(tokens.cls_token, cls_token, rtol=1e-5, atol=1e-5)
        larger = backbone(torch.nn.functional.pad(image, (0, 3, 0, 2)))  # what fills no patch is dropped
    assert tokens.aux_tokens.shape == tokens.patch_tokens.shape == (2, backbone.embed_dim, 3, 5)
    assert larger.patch_tokens.shape[-2:] == (3, 5)
    assert isinstance(backbone, GivesTokens) and not isinstance(backbone, GivesMaps)


@pytest.mark.parametrize("size", [(64, 96), (37, 50)])
@pytest.mark.parametrize(
    "options", [*({"name": name} for name in MAPS), {"name": "vit_small_patch16_dinov3"}]
)
def test_maps_have_the_interface_of_a_cnn(options, size):
    if "dinov3" in options["name"]:
        options = options | {"pyramid": True, "options": SMALL}
    backbone = create_backbone(**options)
    maps = backbone(torch.randn(1, 3, *size))
    assert [m.shape[1] for m in maps] == list(backbone.dims)
    for m, stride in zip(maps, backbone.strides, strict=True):
        assert m.shape[-2:] == tuple(-(-n // stride) for n in size)
    assert backbone.strides[backbone.shallow] == 4
    sum(m.mean() for m in maps).backward()
    unused = [n for n, p in backbone.named_parameters() if p.requires_grad and p.grad is None]
    assert unused in ([], ["vit.net.cls_token"])


def test_the_published_path_is_the_generic_one_with_plain_positions(deit_tiny):
    """At a size whose position embedding is resized."""
    image = torch.randn(1, 3, 96, 64)
    options = {"pretrained": str(deit_tiny), "drop_path_rate": 0.0}
    ours = create_backbone("deit_tiny_patch16_224", **options)
    theirs = create_backbone("timm/deit_tiny_patch16_224", antialias=False, **options)
    with torch.no_grad():
        for a, b in zip(ours(image), theirs(image)):
            assert_close(a, b, rtol=1e-4, atol=1e-4)


# -- methods


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_base_patch32_clip_224"])
def test_hidden_tokens_do_not_count(name):
    """With nothing hidden the class token is the usual one; hidden pixels change nothing."""
    backbone = vit(name)
    image = torch.randn(1, 3, 4 * backbone.patch_size, 4 * backbone.patch_size)
    masks = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    masks[:, 1, 2:] = True
    other = image.clone()
    other[:, :, 2 * backbone.patch_size :] = 3.0
    with torch.no_grad():
        whole, part = masked_class_token(backbone, image, masks)
        assert_close(whole, backbone(image).cls_token[0], rtol=1e-4, atol=1e-5)
        assert_close(part, masked_class_token(backbone, other, masks)[1], rtol=1e-4, atol=1e-5)


def test_crops_are_rounded_to_whole_patches(caplog):
    caplog.set_level("INFO")
    method = ToCo(3, {"name": "vit_small_patch14_reg4_dinov2", "options": SMALL}, local_crop_size=64, **TOCO)
    assert method.local_crop_size == 56 and whole_crop(method, 448, "data.crop_size") == 448
    assert "local_crop_size=64" in caplog.text and "data.crop_size" not in caplog.text


# -- options


@pytest.mark.parametrize("name", ["timm/test_vit3", "test_convnext", "vit_demo", "resnet38d"])
def test_gradient_checkpointing_changes_no_gradient(name):
    sizes = {"vit_demo": {"width": 16, "depth": 4, "heads": 2}, "resnet38d": {"width": 4}}.get(name, {})
    torch.manual_seed(0)
    backbone = create_backbone(name, **sizes).eval()
    torch.manual_seed(0)
    saving = copy.deepcopy(create_backbone(name, grad_checkpointing=True, **sizes)).eval()
    image = torch.randn(1, 3, 32, 32)
    for net in (backbone, saving):
        sum(x.square().mean() for x in net(image)).backward()
    for a, b in zip(backbone.parameters(), saving.parameters()):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            assert_close(a.grad, b.grad)


@pytest.mark.parametrize("options", [{"name": "test_vit3"}, {"name": "test_convnext"}, {"name": "resnet50"}])
def test_earlier_layers_learn_slower(options):
    with torch.device("meta"):
        backbone = create_backbone(**options)
    scales = layer_scales(backbone, 0.5)
    trained = [p for p in backbone.parameters() if p.requires_grad]
    assert set(scales) == set(trained) and max(scales.values()) == 1 and len(set(scales.values())) >= 3
    assert scales[trained[0]] == min(scales.values())


@pytest.mark.parametrize("pyramid", [False, True])
def test_statistics_of_a_data_set_replace_those_of_the_weights(pyramid):
    options = {"depth": 4, "width": 16, "heads": 2, "pyramid": pyramid}
    net = create_backbone("vit_demo", **options).eval()
    own = create_backbone("vit_demo", mean=[10, 20, 30], std=[2, 3, 4], **options).eval()
    own.load_state_dict(net.state_dict())
    rgb = 255 * torch.rand(1, 3, 32, 40)
    expected = (rgb - torch.tensor([10.0, 20, 30]).view(3, 1, 1)) / torch.tensor([2.0, 3, 4]).view(3, 1, 1)
    torch.testing.assert_close(own(normalize(rgb)), net(expected), atol=1e-3, rtol=1e-3)
    if not pyramid:
        torch.testing.assert_close(own.embed(normalize(rgb)), net.embed(expected), atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="three channels"):
        create_backbone("vit_demo", mean=[1, 2, 3, 4], std=[1, 1, 1, 1], **options)


def test_drop_path_and_frozen_parts():
    backbone = vit("test_vit3", drop_path_rate=0.9, frozen=["patch_embed", "blocks.0"])
    assert not backbone.net.blocks[0].attn.qkv.weight.requires_grad
    assert backbone.net.blocks[1].attn.qkv.weight.requires_grad
    image = torch.randn(2, 3, 32, 32)
    assert_close(backbone(image).cls_token, backbone(image).cls_token)
    backbone.train()
    assert not torch.equal(backbone(image).cls_token, backbone(image).cls_token)
    still = create_backbone("test_convnext", frozen="all").train()
    assert not still.training and not any(p.requires_grad for p in still.parameters())


# -- names and weight files


@pytest.mark.parametrize(
    ("error", "options", "key_term"),
    [
        (KeyError, {"name": "vit_small_patch14_dinov"}, "'vit_small_patch14_dinov2'"),
        (KeyError, {"name": "test_vit3", "aux_layr": 1}, "'aux_layer'"),
        (ValueError, {"name": "cait_xxs24_224"}, "any size"),
        (ValueError, {"name": "test_vit3", "aux_layer": 99}, "aux_layer"),
    ],
)
def test_errors_name_what_would_fit(error, options, key_term):
    with pytest.raises(error, match=key_term):
        create_backbone(**options)


def test_a_trial_of_a_name_draws_no_random_number():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with torch.device("meta"):
        create_backbone("test_vit4")
    assert torch.rand(1) == expected


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "timm/deit_tiny_patch16_224"])
def test_weight_files_in_circulation(deit_tiny, name):
    plain = {key: value.float() for key, value in load_file(deit_tiny).items()}
    body = {key: value for key, value in plain.items() if not key.startswith("head")}
    grid = torch.nn.functional.interpolate(body["pos_embed"][:, 1:].mT, size=100).mT
    small = body | {"pos_embed": torch.cat([body["pos_embed"][:, :1], grid], 1)}
    noise = {key: torch.zeros_like(value) for key, value in body.items()}
    files = {
        "plain": plain,
        "module": {"state_dict": {f"module.{key}": value for key, value in plain.items()}},
        "ema": {"model": noise, "model_ema": plain, "epoch": 3},
        "dino": {
            "student": {f"module.backbone.{key}": value for key, value in noise.items()},
            "teacher": {f"backbone.{key}": value for key, value in body.items()}
            | {"head.mlp.0.bias": plain["norm.bias"]},
            "epoch": 1,
        },
        "21k": body | {"pre_logits.fc.weight": torch.zeros(192, 192), "head.weight": torch.zeros(9, 192)},
        "own": {
            "model": {f"backbone.net.{key}": v for key, v in body.items()}
            | {"classifier.weight": plain["norm.bias"]}
        },
        "positions": small,
    }
    with torch.device("meta"):
        backbone = create_backbone(name)
    for kind, state in files.items():
        found = pretrained_weights(backbone, state, kind)
        assert torch.equal(found["blocks.3.attn.qkv.weight"], body["blocks.3.attn.qkv.weight"]), kind
        assert found["pos_embed"].shape == body["pos_embed"].shape
    distilled = body | {"dist_token": body["cls_token"], "pos_embed": torch.zeros(1, 198, 192)}
    for state, key_term in [
        (distilled, "distilled"),
        ({"epoch": 1}, "no weights"),
        ({"layer1.0.conv1.weight": torch.zeros(3)}, "fit|network"),
    ]:
        with pytest.raises(ValueError, match=key_term) as caught:
            pretrained_weights(backbone, state, "test")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "authors"),
    [
        *((name, {}) for name in VITS),
        ("vit_small_patch16_dinov3", {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma"}),
        ("deit3_small_patch16_224", {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}),
    ],
)
def test_weights_of_timm_and_under_the_names_of_authors_load(name, authors):
    with torch.device("meta"):
        backbone = vit(name)
    plain = timm.create_model(name, num_classes=3, **VITS[name]).state_dict()
    state = dict(plain)
    for theirs, ours in authors.items():
        state = {key.replace(theirs, ours): value for key, value in state.items()}
    found = pretrained_weights(backbone, {"student": state}, "test")
    assert found and all(torch.equal(value, plain[key]) for key, value in found.items())
