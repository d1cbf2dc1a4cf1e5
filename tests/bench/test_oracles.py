"""Oracles: crops that are tagged by masks, walks that stay within the classes of a mask."""

import pytest
import torch

from bench.oracles import AffinityNetTrueWalk, IRNetTrueWalk, SeCoTrueTags
from methods.seco import SeCo
from ops.cam import present_classes
from tests.methods.demo import demo_method


def test_crops_are_tagged_by_the_mask():
    options = {"follow": "paper", "local_crop_size": 8, "num_local_crops": 20}
    batch = {"valid_box": torch.tensor([[0, 48, 0, 48]]), "sample_seed": torch.tensor([0])}
    batch["pseudo_label"] = torch.zeros(1, 48, 48, dtype=torch.int64)
    batch["pseudo_label"][:, :, 24:] = 1
    cam, present = torch.ones(1, 1, 48, 48), present_classes(torch.ones(1, 1))
    places, tags = demo_method(SeCoTrueTags, **options).decompose(batch, cam, present)
    assert torch.equal(places, demo_method(SeCo, **options).decompose(batch, cam, present)[0])
    left = places[0, :, 1]
    assert tags[0, 2:][left < 16].eq(0).all() and tags[0, 2:][left >= 24].eq(1).all()


@pytest.mark.parametrize("kind", [AffinityNetTrueWalk, IRNetTrueWalk])
def test_a_walk_with_true_affinities_fills_the_object_and_stops_at_its_outline(kind):
    backbone = {"name": "vit_demo", "width": 32, "depth": 4, "heads": 2, "image_size": 48, "pyramid": True}
    method = kind(4, backbone)
    mask = torch.zeros(1, 1, 48, 48, dtype=torch.int64)
    mask[..., 8:32, 16:40], mask[..., 40:, :] = 3, 255
    cam = torch.zeros(1, 48, 48)
    cam[:, 8:32, 16:32] = 1  # two thirds of the object
    found = method.propagate(mask, cam).argmax(0)
    inside, outside = mask[0, 0] == 3, mask[0, 0] == 0
    assert found[outside].float().mean() < 0.1 and found[inside].float().mean() > 0.8
