"""The oracle tags crops by the masks, whatever the CAM says, and takes the same crops as SeCo."""

import torch

from bench.oracles import SeCoTrueTags
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
