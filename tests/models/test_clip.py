"""models/backbones/clip.py: tokens, attention and text vectors are open_clip's, at random weights."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from models.backbones import create_backbone
from models.refiners.attention_affinity import mean_attention
from tests.clip import SMALL
from utils.image import denormalize

open_clip = pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return create_backbone(**SMALL).eval().requires_grad_(False)


def test_tokens_and_class_vector_are_those_of_open_clip(backbone):
    visual, image = backbone.visual, torch.randn(2, 3, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (visual.image_mean, visual.image_std))
    found = visual.forward_intermediates(
        (denormalize(image) / 255 - mean) / std,
        indices=3,
        normalize_intermediates=True,
        output_extra_tokens=True,
    )
    tokens = backbone(image)
    assert_close(tokens.patch_tokens, found["image_intermediates"][-1], rtol=1e-5, atol=1e-5)
    assert_close(tokens.cls_token @ visual.proj, found["image_features"], rtol=1e-5, atol=1e-5)


def test_text_vectors_are_those_of_open_clip(backbone):
    texts = ["a clean origami dog.", "sky"]
    torch.manual_seed(0)
    whole = open_clip.create_model(SMALL["model"], **SMALL["config"])
    whole.load_state_dict(
        {**backbone.texts.state_dict(), **{f"visual.{k}": v for k, v in backbone.visual.state_dict().items()}}
    )
    expected = whole.encode_text(backbone.tokenize(texts), normalize=True)
    assert_close(backbone.encode_texts(texts), expected, rtol=1e-5, atol=1e-5)


def test_images_of_any_size_and_the_attention_of_their_patches(backbone):
    attention, grid = mean_attention(backbone, torch.randn(2, 3, 50, 41), 2)
    assert grid == (6, 5) and attention.shape == (2, 30, 30) and (attention > 0).all()
    x, _ = backbone.embed(torch.randn(2, 3, 50, 41))
    block = backbone.blocks[0]
    weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
    q, k, _ = F.linear(block.ln_1(x), weight, bias).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
    expected = (q @ k.transpose(2, 3) / 4).softmax(-1).mean(1)
    assert_close(backbone.walk(x)[1][0], expected, rtol=1e-5, atol=1e-5)
