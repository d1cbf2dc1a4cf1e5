"""models/refiners/attention_affinity.py: the walk in plain float64, attention of timm's blocks."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from models.backbones import create_backbone
from models.refiners.attention_affinity import box_mask, mean_attention, spread, transition
from tests.methods.demo import VIT


def test_walk_is_that_of_the_paper():
    """CLIP-ES, equations of section 3.4, entry by entry in float64."""
    generator = np.random.default_rng(0)
    attention, cam = generator.random((2, 12, 12)) + 0.05, generator.random((2, 3, 3, 4))
    walked = spread(torch.from_numpy(cam), transition(torch.from_numpy(attention)), 0.4).numpy()
    for b in range(2):
        w = attention[b].copy()
        for _ in range(3):
            w = np.stack([w[:, j] / sum(w[i, j] for i in range(12)) for j in range(12)], 1)
            w = np.stack([w[i] / sum(w[i, j] for j in range(12)) for i in range(12)], 0)
        w = np.array([[(w[i, j] + w[j, i]) / 2 for j in range(12)] for i in range(12)])
        w = np.array([[sum(w[i, k] * w[k, j] for k in range(12)) for j in range(12)] for i in range(12)])
        for m in range(3):
            inside = box_mask(torch.from_numpy(cam[b : b + 1, m : m + 1]), 0.4).numpy().ravel()
            expected = [sum(w[i, j] * inside[j] * cam[b, m].flat[j] for j in range(12)) for i in range(12)]
            assert_close(walked[b, m].ravel(), np.array(expected), rtol=1e-9, atol=0)


def test_boxes_hold_what_exceeds_the_threshold():
    maps = torch.zeros(1, 2, 6, 8)
    maps[0, 0, 1, 1] = maps[0, 0, 2, 2] = 1  # touch at a corner
    maps[0, 0, 5, 7] = 0.5
    maps[0, 0, 4, 4] = 0.3
    expected = torch.zeros(1, 2, 6, 8)
    expected[0, 0, 1:3, 1:3] = expected[0, 0, 5, 7] = 1
    assert torch.equal(box_mask(maps, 0.4), expected)


def test_attention_is_what_the_blocks_compute():
    torch.manual_seed(0)
    network, image = create_backbone(**VIT).eval(), torch.randn(2, 3, 48, 32)
    with torch.no_grad():
        attention, grid = mean_attention(network, image, 2)
        x, expected = network.embed(image), []
        for block in network.blocks:
            q, k = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)[:2]
            expected.append((q @ k.transpose(2, 3) / 4).softmax(-1).mean(1)[:, 1:, 1:])
            x = block(x)
    assert grid == (6, 4) and attention.shape == (2, 24, 24)
    assert_close(attention, (expected[-1] + expected[-2]) / 2, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="plain ViT"):
        mean_attention(create_backbone("vgg16d"), image, 2)
