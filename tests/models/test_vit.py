"""The ViT backbones and their weights."""

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from models.backbones import create_backbone, load_pretrained
from models.backbones.vit import ViT
from tests.recorded import recorded

SMALL = dict(embed_dim=32, depth=3, num_heads=2, img_size=64, patch_size=16)


POSITIONS = {"up": (224, (448, 448)), "down": (224, (96, 64)), "odd": (384, (150, 330))}  # image sizes


@recorded("vit_pos_embed")
def test_position_embedding_matches_reference_values(case):
    for tag in case:
        model, image = POSITIONS.get(tag, POSITIONS["up"])
        model = case.setting("model|img_size|model_size", model, tag)
        image = case.setting("image|size|image_size", image, tag)[-2:]
        width, patch = case[tag].shape[1], case.setting("patch|patch_size", 16)
        vit = ViT(img_size=model, patch_size=patch, embed_dim=width, depth=3, num_heads=2)
        with torch.no_grad():
            vit.pos_embed.copy_(case.arr(f"pos/{tag}", (1, 1 + (model // patch) ** 2, width)))
            vit.cls_token.copy_(case.arr(f"pos/cls_{tag}", (1, 1, width)))
            vit.patch_embed.proj.weight.zero_()
            vit.patch_embed.proj.bias.zero_()
            case.compare(tag, vit.embed(torch.zeros(1, 3, *image))[0])


def test_auxiliary_tokens_are_raw_block_outputs():
    image = torch.randn(1, 3, 70, 48)
    outputs = {}
    for layer in (-3, -2, -1, 1):
        torch.manual_seed(0)
        vit = ViT(aux_layer=layer, **SMALL).eval()
        tokens = vit(image)
        assert tokens.patch_tokens.shape == tokens.aux_tokens.shape == (1, 32, 4, 3)
        outputs[layer] = tokens
    assert_close(outputs[-1].aux_tokens, outputs[-1].patch_tokens)
    assert_close(outputs[-2].aux_tokens, outputs[1].aux_tokens)
    assert not torch.allclose(outputs[-2].aux_tokens, outputs[-3].aux_tokens)


def test_pixels_beyond_the_last_whole_patch_do_not_count():
    vit = ViT(**SMALL).eval()
    image = torch.randn(1, 3, 79, 65)
    for a, b in zip(vit(image), vit(image[..., :64, :64])):
        assert_close(a, b)


def test_image_smaller_than_a_patch_is_stretched_to_one():
    """A thumbnail, or a small photo at half its size, must not end an inference over a whole set."""
    vit = ViT(**SMALL).eval()
    image = torch.randn(1, 3, 1, 1)
    tokens = vit(image.expand(1, 3, 9, 40))
    assert tokens.patch_tokens.shape == tokens.aux_tokens.shape == (1, 32, 1, 2)
    for a, b in zip(tokens, vit(image.expand(1, 3, 16, 40))):
        assert_close(a, b)


def test_position_embedding_is_frozen_unless_trained_from_scratch():
    assert not create_backbone("deit_tiny_patch16_224").pos_embed.requires_grad
    assert create_backbone("vit_demo").pos_embed.requires_grad


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_local_weights_load_in_both_formats(tmp_path, suffix):
    options = dict(width=32, depth=3, heads=2, image_size=32)
    source = create_backbone("vit_demo", **options)
    half = {key: value.half().contiguous() for key, value in source.state_dict().items()}
    half["head.weight"] = torch.zeros(1000, 32)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"model": half}, path)  # as DeiT's own files nest them
    else:
        save_file(half, path)
    loaded = create_backbone("vit_demo", pretrained=path, **options)
    for key, value in loaded.state_dict().items():
        assert value.dtype == torch.float32
        assert_close(value, half[key].float())


def test_weights_that_do_not_fit_or_are_not_there_are_named(monkeypatch):
    state = create_backbone("vit_demo", width=32, depth=3, heads=2).state_dict()
    with pytest.raises(ValueError, match=r"do not fit: .*blocks\.3"):
        load_pretrained(create_backbone("vit_demo", width=32, depth=4, heads=2), state, "test")

    def offline(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(
        FileNotFoundError, match=r"deit_tiny_patch16_224\.fb_in1k.*method\.backbone\.pretrained"
    ):
        create_backbone("deit_tiny_patch16_224", pretrained="timm")
